"""The reference of all settings, written from the models that check them: one page for each stage and each subject.

A block of settings is a subclass of `Config`. It stands on the page of its module, under its class's name, with a table
of its settings; where a setting is a block itself, its type leads there.
"""

from __future__ import annotations

import html
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic.fields import FieldInfo

from genpipe.config import WHERE, Config, changed
from genpipe.pipeline.graph import PipelineConfig
from genpipe.stages import is_training, load_stage, stage_kinds

Block = type[Config]

PAGES = {
    "pipeline": (
        "Pipeline",
        "What stands at the top of a pipeline's file. Beside the settings of its stage a block under `stages` may have "
        "`kind` (the stage; default: the block's name), `inputs` (by role: an instance, a list of them, an artifact's "
        "URI or a registered model) and `matrix` (settings with lists of values: an instance for each combination).",
        ("genpipe.pipeline",),
    ),
    "resources": (
        "Resources and observation",
        "How a stage is run and how it is watched. Neither changes what comes out or is part of the fingerprint.",
        ("genpipe.stage_config", "genpipe.training.objective", "genpipe.training.checkpoint_store"),
    ),
    "train": ("Training", "How a training stage trains; see [Training](../training.md).", ("genpipe.training",)),
    "sources": ("Sources", "Where pictures come from; see [Data](../data.md).", ("genpipe.data.sources",)),
    "images": ("Images", "What becomes of images before they are trained on.", ("genpipe.data",)),
    "models": ("Models", "The networks and their sizes; see [Methods](../methods.md).", ("genpipe.models",)),
    "samplers": (
        "Diffusion and samplers",
        "What a diffusion model is trained for, and how pictures are drawn from it. What each sampler does: "
        "[Python](python.md#samplers).",
        ("genpipe.diffusion",),
    ),
    "systems": ("Systems", "Trained parts joined to something that draws.", ("genpipe.generation",)),
    "prompts": ("Prompts", "What the stage `sample` is to draw.", ("genpipe.generation.prompts",)),
    "metrics": ("Metrics", "What `evaluate` measures; see [Metrics](../methods/metrics.md).", ("genpipe.evaluation",)),
    "files": (
        "Files from elsewhere",
        "Files that numbers depend on, named with their digests.",
        ("genpipe.pinned_files", "genpipe.weights"),
    ),
}
"""Each page's title, what it is about, and the modules whose blocks it has: the longest name that fits decides."""

STAGES = "genpipe.stages."
MOST_USES = 4


def setting_pages() -> dict[str, str]:
    """All pages, by their path below the folder of the reference."""
    found = blocks()
    pages = {f"stages/{kind}.md": _stage_page(kind, found) for kind in stage_kinds()}
    for page, (title, about, _) in PAGES.items():
        sections = [
            _section(block, uses, page=f"{page}.md") for block, uses in found.items() if _page(block) == f"{page}.md"
        ]
        pages[f"{page}.md"] = "\n\n".join([f"# {title}", about, *sections]) + "\n"
    return pages


def blocks() -> dict[Block, list[str]]:
    """Every block that a pipeline's file may have, with the dotted paths where it may stand."""
    found: dict[Block, list[str]] = {PipelineConfig: []}
    _walk(PipelineConfig, "", found, ())
    for kind in stage_kinds():
        config = load_stage(kind).Config
        found[config] = [f"stages.{kind}"]
        _walk(config, f"stages.{kind}", found, ())
    return found


def _walk(block: Block, at: str, found: dict[Block, list[str]], above: tuple[Block, ...]) -> None:
    for name, info in block.model_fields.items():
        for inner in blocks_in(info.annotation):
            path = f"{at}.{name}{'.NAME' if get_origin(info.annotation) is dict else ''}".lstrip(".")
            uses = found.setdefault(inner, [])
            if path not in uses:
                uses.append(path)
            if inner not in above:
                _walk(inner, path, found, (*above, inner))


def blocks_in(annotation: Any) -> Iterator[Block]:
    """The blocks that a setting of this type may be, or hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for inner in get_args(annotation):
        if not isinstance(inner, str):
            yield from blocks_in(inner)


def description(block: Block, name: str) -> str:
    """What a setting means: as its block says, or one that it inherits from, or the block that it is."""
    for owner in block.__mro__:
        if issubclass(owner, Config) and name in owner.model_fields and owner.model_fields[name].description:
            return str(owner.model_fields[name].description)
    inner = list(blocks_in(block.model_fields[name].annotation))
    return _lower(_paragraphs(inner[0])[0]).removesuffix(".") if len(inner) == 1 else ""


def kind_of(block: Block) -> str:
    """What tells it from other blocks of its union, empty for a block without a `kind`, and where it is a setting."""
    kinds = get_args(block.model_fields["kind"].annotation) if "kind" in block.model_fields else ()
    return kinds[0] if len(kinds) == 1 else ""


def _stage_page(kind: str, found: Mapping[Block, list[str]]) -> str:
    stage = load_stage(kind)
    page = f"stages/{kind}.md"
    own = [block for block in found if block.__module__ == stage.__name__ and block is not stage.Config]
    headlines = ", ".join(f"`{name}`" for name in stage.HEADLINES)
    facts = [
        f"**Makes** an artifact of kind `{stage.MAKES}`; version {stage.VERSION}; "
        f"{'a training stage' if is_training(stage) else 'a data stage'}.",
        f"**Takes** {_lower(' '.join(_paragraphs(stage.roles)))}",
        f"**Reports** {headlines}, among others.",
    ]
    return "\n\n".join([
        f"# {kind}", *map(marked, _paragraphs(stage)), *facts, f"## Settings {{ #{stage.Config.__name__} }}",
        *map(marked, _paragraphs(stage.Config)), _table(stage.Config, page=page),
        *(_section(block, found[block], page=page) for block in own),
    ]) + "\n"  # fmt: skip


def _section(block: Block, uses: list[str], *, page: str) -> str:
    kind = kind_of(block)
    title = f"## {block.__name__}" + (f" (`kind: {kind}`)" if kind else "") + f" {{ #{block.__name__} }}"
    told = ", ".join(f"`{path}`" for path in uses[:MOST_USES])
    more = f" and {len(uses) - MOST_USES} more" if len(uses) > MOST_USES else ""
    where = [f"At {told}{more}."] if uses else []
    return "\n\n".join([title, *map(marked, _paragraphs(block)), *where, _table(block, page=page)])


def _table(block: Block, *, page: str) -> str:
    names = [name for name in block.model_fields if name != "kind" or not kind_of(block)]
    if not names:
        return "It has no settings."
    rows = [_row(block, name, page=page) for name in names]
    return "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *rows])


def _row(block: Block, name: str, *, page: str) -> str:
    info = block.model_fields[name]
    cells = (f"`{name}`", _type(info, page=page), _default(info), marked(description(block, name)))
    return f"| {' | '.join(cells)} |"


def _type(info: FieldInfo, *, page: str) -> str:
    if WHERE in info.metadata:
        return "path"
    return ", ".join([type_name(info.annotation, page=page), *_bounds(info.metadata)])


def type_name(annotation: Any, *, page: str = "") -> str:
    """A type as people write its values; on a `page` of the reference blocks are links."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return f"[{kind_of(annotation) or annotation.__name__}]({_link(annotation, page)})"
    if origin is Annotated:
        name = "path" if WHERE in inner[1:] else type_name(inner[0], page=page)
        return " ".join([name, *_bounds(inner[1:])])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(each, page=page) for each in inner)
    if origin is tuple and Ellipsis not in inner:
        return f"\\[{', '.join(type_name(each, page=page) for each in inner)}\\]"
    if origin in (tuple, list):
        return f"list of {type_name(inner[0], page=page)}"
    if origin is dict:
        return f"mapping of names to {type_name(inner[1], page=page)}"
    if origin is not None:
        raise ValueError(f"settings.py: no name for the type {annotation}; add one to type_name")
    return {type(None): "`null`", Any: "anything", Path: "path"}.get(annotation, getattr(annotation, "__name__", ""))


def _bounds(metadata: Any) -> list[str]:
    found = []
    for each in metadata:
        match each:
            case Ge(ge=least):
                found.append(f"≥ {least}")
            case Gt(gt=bound):
                found.append(f"&gt; {bound}")
            case Le(le=most):
                found.append(f"≤ {most}")
            case Lt(lt=bound):
                found.append(f"&lt; {bound}")
            case MultipleOf(multiple_of=unit):
                found.append(f"a multiple of {unit}")
            case MinLen(min_length=least):
                found.append(f"at least {least}")
            case MaxLen(max_length=most):
                found.append(f"at most {most}")
            case FieldInfo(metadata=inner):
                found += _bounds(inner)
    return found


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "*required*"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, Config):
        settings = {name: each for name, each in changed(value).items() if name != "kind"}
        kind = kind_of(type(value)) or ("" if "kind" not in type(value).model_fields else value.kind)  # type: ignore[attr-defined]
        shown = {**({"kind": kind} if kind else {}), **settings}
        return f"`{_flow(shown)}`" if shown else "its defaults"
    if isinstance(value, tuple):
        value = [changed(each) if isinstance(each, Config) else each for each in value]
    return f"`{_flow(value)}`" if value != "" else '`""`'


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(json.loads(json.dumps(value)), default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _link(block: Block, page: str) -> str:
    target = _page(block)
    up = "../" * page.count("/")
    return f"#{block.__name__}" if target == page else f"{up}{target}#{block.__name__}"


def _page(block: Block) -> str:
    """The page that a block stands on. Raises ValueError for one whose module has none."""
    if block.__module__.startswith(STAGES):
        return f"stages/{block.__module__.removeprefix(STAGES)}.md"
    modules = {module: page for page, (_, _, owned) in PAGES.items() for module in owned}
    near = [module for module in modules if f"{block.__module__}.".startswith(f"{module}.")]
    if not near:
        raise ValueError(f"settings.py: no page for {block.__module__}.{block.__name__}; add its module to PAGES")
    return f"{modules[max(near, key=len)]}.md"


def _paragraphs(documented: Any) -> list[str]:
    return re.split(r"\n\n+", inspect.getdoc(documented) or "")


def _lower(text: str) -> str:
    """`text` as the rest of a sentence; a first word like LPIPS stays as it is."""
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text


def marked(text: str) -> str:
    """Text as Markdown that shows it as it is, but for `code`."""
    parts = text.split("`")
    for i, part in enumerate(parts):
        code = i % 2 == 1
        parts[i] = (
            part.replace("|", "\\|") if code else re.sub(r"([\\*_\[\]{}|])", r"\\\1", html.escape(part, quote=False))
        )
    return "`".join(parts)
