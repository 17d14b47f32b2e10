"""Fuse a plan's steps to few passes over the pixels: neighbouring steps of one kind become one pass."""

from collections.abc import Sequence

from refract.augment.ops.base import Args
from refract.augment.ops.color import ColorJitter, ColorOp, Hue
from refract.augment.ops.erasing import ErasingOp
from refract.augment.ops.geometric import GeometricOp, product
from refract.augment.ops.pixel import BlendOp, PixelOp
from refract.augment.ops.tone import ToneOp
from refract.augment.passes import BlendPass, ColorPass, HsvHuePass, OpPass, Pass, TablePass, WarpPass
from refract.augment.plan import Plan, Step
from refract.augment.registry import OPS
from refract.augment.resize_libraries import REFRACT


def fuse(plan: Plan) -> list[Pass]:
    """Return the passes of a plan for one image, in order. An exact plan gives one pass per step, except for joined tables.

    Steps of batch ops are skipped: see `batch_steps`.
    """
    return [item for item, _ in fuse_with_steps(plan)]


def fuse_with_steps(plan: Plan) -> list[tuple[Pass, tuple[Step, ...]]]:
    """As `fuse`, but return each pass with the steps that it executes."""
    passes: list[tuple[Pass, tuple[Step, ...]]] = []
    size = plan.size
    default = "bilinear" if plan.interpolation == REFRACT else plan.interpolation
    for step in plan.steps:
        op, args = OPS[step.op], dict(step.args)
        last, fused = passes[-1] if passes else (None, ())
        if issubclass(op, GeometricOp):
            matrix, size = op.geometry(args, size)
            border, fill = args.get("border", "constant"), tuple(args.get("fill", (0, 0, 0)))
            interpolation = args.get("interpolation", default)
            if isinstance(last, WarpPass) and not plan.exact:
                matrix = product(last.matrix, matrix)
                border, fill = args.get("border", last.border), tuple(args.get("fill", last.fill))
                interpolation = args.get("interpolation", last.interpolation)
                passes[-1] = WarpPass(matrix, size, border, fill, interpolation), (*fused, step)
            else:
                passes.append((WarpPass(matrix, size, border, fill, interpolation), (step,)))
        elif issubclass(op, ColorOp):
            if plan.exact:
                passes += [(item, (step,)) for item in _exact_color(op, args)]
            elif isinstance(last, ColorPass):
                passes[-1] = ColorPass((*last.steps, (op, args))), (*fused, step)
            else:
                passes.append((ColorPass(((op, args),)), (step,)))
        elif issubclass(op, ToneOp):
            # Joining tables of whole levels loses nothing, so an exact plan joins them too.
            if isinstance(last, TablePass):
                passes[-1] = TablePass((*last.steps, (op, args))), (*fused, step)
            else:
                passes.append((TablePass(((op, args),)), (step,)))
        elif issubclass(op, BlendOp):
            image_weight, chains = op.chains(args)
            terms = tuple(
                (weight, tuple(fuse(Plan(size, chain, interpolation=plan.interpolation)))) for weight, chain in chains
            )
            passes.append((BlendPass(step.op, image_weight, terms), (step,)))
        elif issubclass(op, (PixelOp, ErasingOp)):
            passes.append((OpPass(op, args), (step,)))
    return passes


def _exact_color(op: type[ColorOp], args: Args) -> list[Pass]:
    """Return one pass for each single op, so that each result is rounded and clipped."""
    if op is ColorJitter:
        return [item for name, part in ColorJitter.parts(args) for item in _exact_color(OPS[name], part)]  # type: ignore[arg-type]
    return [HsvHuePass(args["turns"])] if op is Hue else [ColorPass(((op, args),))]


def batch_steps(plans: Sequence[Plan]) -> list[list[Step]]:
    """Return the steps of batch ops, for each plan."""
    return [[step for step in plan.steps if OPS[step.op].kind == "batch"] for plan in plans]
