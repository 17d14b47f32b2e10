"""`python docs/readability.py [PATH…]`: report Markdown that is hard to read, as FILE:LINE.

- a sentence of more than 40 words
- a page whose sentences have more than 20 words on average
- a nested list that is not indented by four spaces, which the documentation site would not nest

Tables, code, headings and generated pages are not checked. A name in backticks counts as one word.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LONGEST, LONGEST_MEAN = 40, 20
GENERATED = "<!-- Written by docs/make_reference.py"
ITEM = re.compile(r"( *)(?:[-*]|\d+\.) ")
END = re.compile(r"(?<=[.!?])[)*”\"]*\s+(?=\S)")
ABBREVIATION = re.compile(r"\b(?:al|e\.g|i\.e|vs|cf|No)\.$")
WORD = re.compile(r"[^\W_]+(?:[-'’.,:/×]*[^\W_]+)*")


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each paragraph and list item."""
    block: list[str] = []
    start, fenced = 0, False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fence = line.lstrip().startswith("```")
        if (
            fence
            or fenced
            or not line.strip()
            or line.lstrip().startswith(("#", "|", "![", "<!--", ":::"))
            or ITEM.match(line)
        ):
            if block:
                yield start, " ".join(block)
            block = []
        fenced ^= fence
        if fence or fenced or not line.strip() or line.lstrip().startswith(("#", "|", "![", "<!--", ":::")):
            continue
        start = start if block else number
        block.append(ITEM.sub("", line, count=1).strip())


def sentences(block: str) -> list[int]:
    """The number of words of each sentence of a paragraph."""
    plain = re.sub(r"`[^`]*`", " name ", block)
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    parts: list[str] = []
    for part in END.split(plain):
        if parts and ABBREVIATION.search(parts[-1]):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return [count for count in (len(WORD.findall(part)) for part in parts) if count]


def of_page(text: str) -> Iterator[tuple[int, str]]:
    """(line, problem) of a page."""
    counts: list[int] = []
    for line, block in blocks(text):
        for count in sentences(block):
            counts.append(count)
            if count > LONGEST:
                yield line, f"a sentence of {count} words; at most {LONGEST}"
    if counts and sum(counts) / len(counts) > LONGEST_MEAN:
        yield 1, f"the sentences have {sum(counts) / len(counts):.1f} words on average; at most {LONGEST_MEAN}"
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (item := ITEM.match(line)) and len(item[1]) % 4:
            yield number, f"a list item indented by {len(item[1])} spaces; a nested list needs four for each level"


def main(arguments: list[str]) -> int:
    listed = subprocess.run(["git", "ls-files", "-z", *arguments], capture_output=True, text=True, check=True).stdout
    count = 0
    for path in map(Path, sorted(filter(None, listed.split("\0")))):
        if path.suffix != ".md" or GENERATED in (text := path.read_text("utf-8")):
            continue
        for line, problem in of_page(text):
            print(f"{path}:{line}: {problem}")
            count += 1
    print(f"{count} places to mend" if count else "readability: no place to mend")
    return bool(count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
