"""`refract completion SHELL`: a script that completes commands, options and config keys."""

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Mapping

from refract.output import help_of

PLACEHOLDER = "--section.key"
"""How the help of a command says that it accepts every key of the config."""

ANY_OPTION = "--option"
"""How a usage line names an option without a name."""

USAGE = {
    "bash": 'eval "$(refract completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(refract completion zsh)" in ~/.zshrc, after compinit',
    "fish": "refract completion fish > ~/.config/fish/completions/refract.fish",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract completion",
        description="Print a script that completes the commands, options and config keys of refract in a shell.",
        epilog=f"Install it by: {'; '.join(USAGE.values())}.",
    )
    parser.add_argument("shell", choices=list(USAGE))
    shell = parser.parse_args(argv).shell
    print(fish_script() if shell == "fish" else bash_script(zsh=shell == "zsh"))
    return 0


def options() -> Mapping[str, list[str]]:
    """Return the long options of each command, as its help lists them."""
    from refract.cli import COMMANDS

    options_by_command: dict[str, set[str]] = {}
    for command, (module, _) in COMMANDS.items():
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
        text.write(help_of(command))
        options_by_command[command] = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text.getvalue())) - {ANY_OPTION}
    keys = {option for option in options_by_command["train"] if "." in option} - {PLACEHOLDER}
    return {
        command: sorted((names | keys if PLACEHOLDER in names else names) - {PLACEHOLDER})
        for command, names in options_by_command.items()
    }


def bash_script(*, zsh: bool = False) -> str:
    """Return the script for bash; zsh runs it by its bashcompinit. Words that no command or option starts with complete as file names."""
    from refract.cli import COMMANDS

    cases = "\n".join(f"    {command}) words='{' '.join(names)}' ;;" for command, names in options().items())
    head = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return f"""{head}_refract() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words=''
  if [ "$COMP_CWORD" -eq 1 ]; then words='{" ".join(COMMANDS)}'
  elif [ "${{current#-}}" != "$current" ]; then case "${{COMP_WORDS[1]}}" in
{cases}
  esac; fi
  local IFS=$'\\n'
  COMPREPLY=($(compgen -W "${{words// /$IFS}}" -- "$current"))
  if [ "$COMP_CWORD" -gt 1 ] && [ "${{#COMPREPLY[@]}}" -eq 0 ]; then
    compopt -o filenames 2>/dev/null
    COMPREPLY=($(compgen -f -- "$current"))
  fi
}}
complete -F _refract refract"""


def fish_script() -> str:
    """Return the script for fish."""
    from refract.cli import COMMANDS

    lines = [
        f"complete -c refract -n __fish_use_subcommand -f -a {command} -d '{_quoted(line)}'"
        for command, (_, line) in COMMANDS.items()
    ]
    for command, names in options().items():
        lines += [f"complete -c refract -n '__fish_seen_subcommand_from {command}' -l {name[2:]}" for name in names]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
