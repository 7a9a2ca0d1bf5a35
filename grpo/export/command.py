"""The command line of an export. All checks that need no weights come before any weights are read.

    python -m grpo.export --checkpoint output/checkpoint_20 --to merged_16bit,gguf --quant f16,q8_0 --out exported
    python -m grpo.export --checkpoint output/checkpoint_20 --to merged_16bit --out exported --push user/name --dry_run
    python -m grpo.export --out exported --push user/name        send an earlier export

An export is written into a temporary folder, which is then renamed to --out.
"""

import argparse
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from grpo.checkpoints import card
from grpo.checkpoints.choose import choose
from grpo.checkpoints.manifest import CHECKPOINT_NAME, files_in, sync, write_manifest
from grpo.config.messages import OneLineParser
from grpo.errors import UserError, warn
from grpo.export import push
from grpo.export.folders import (
    DTYPES,
    add_recipe,
    check_lora,
    check_merged_4bit,
    write_lora,
    write_merged_4bit,
    write_merged_16bit,
)
from grpo.export.source import Source
from grpo.models.checks import quiet
from grpo.models.upload import find_token

METHODS = ("merged_16bit", "merged_4bit", "lora", "gguf")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = OneLineParser(prog="python -m grpo.export", description="Export a checkpoint.", allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, help="a folder such as output/checkpoint_20")
    parser.add_argument("--to", default="", help=f"one or several, with commas: {', '.join(METHODS)}")
    parser.add_argument("--quant", help="with gguf, with commas: f16 (default), q8_0, q5_k_m, q4_k_m")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of merged_16bit (default: bf16)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--for_serving", action="store_true", help="put the prompt recipe into the chat template")
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl for the model card (default: the run's own)")
    parser.add_argument(
        "--push",
        metavar="USER/NAME",
        help="send it to this hub repository, with the token of HF_TOKEN or of `hf auth login`",
    )
    parser.add_argument("--public", action="store_true", help="with --push: make a new repository public")
    parser.add_argument("--dry_run", action="store_true", help="with --push: only list what would be sent")
    return parser.parse_args(argv)


def split(text: str, what: str, allowed: tuple[str, ...]) -> list[str]:
    """Words between commas, each once. Raises UserError.

    >>> split("gguf,lora,gguf", "to", METHODS)
    ['gguf', 'lora']
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in allowed:
            raise UserError(f"{what}: must be of {', '.join(allowed)}, got {word[:40]!r}. Name several with commas.")
    return words


def check(args: argparse.Namespace) -> None:
    """Check which arguments go together. Raises UserError."""
    if args.push is not None:
        push.check_name(args.push)
    if args.push is None and (args.dry_run or args.public):
        raise UserError("dry_run, public: they go with --push user/name.")
    if bool(args.to) != (args.checkpoint is not None):
        raise UserError("to, checkpoint: one needs the other: --checkpoint output/checkpoint_20 --to merged_16bit.")
    if not args.to and args.push is None:
        raise UserError("to: nothing to do. Use --checkpoint output/checkpoint_20 --to merged_16bit.")
    methods = split(args.to, "to", METHODS) if args.to else []
    for flag, goes_with in (("quant", {"gguf"}), ("dtype", {"merged_16bit"}), ("metrics", set(METHODS))):
        if getattr(args, flag) is not None and not goes_with & set(methods):
            raise UserError(f"{flag}: goes with --to {' or '.join(sorted(goes_with))}. Leave it out.")
    if args.for_serving and not args.to:
        raise UserError("for_serving: goes with --checkpoint and --to. Leave it out.")
    if not args.to and not args.out.is_dir():
        raise UserError(f"out: no export in {str(args.out)[:200]!r}. Make one with --checkpoint and --to.")


def check_out(out: Path) -> None:
    """Refuse a folder with content, and one that would be taken for a checkpoint. Raises UserError."""
    try:
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise UserError(f"out: {out} exists, and is never overwritten. Choose another folder, or remove it.")
    except OSError as error:
        raise UserError(f"out: {str(out)[:80]!r} cannot be used: {error.strerror}. Choose another folder.") from None
    if CHECKPOINT_NAME.fullmatch(out.resolve().name):
        raise UserError(f"out: {out.name} is a checkpoint's name, and would be taken for one. Choose another.")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to `out` at the end, removed after an error. Raises UserError."""
    out = out.absolute()
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in sorted(temporary.rglob("*")):
                sync(path)
            os.rename(temporary, out)
            sync(out.parent)
        except OSError as error:
            raise UserError(f"out: {out} could not be written: {error}. Free space, or choose another.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(source: Source, methods: list[str], args: argparse.Namespace) -> list[tuple[str, Callable[[Path], str]]]:
    """Every method with the function that writes it, after checking that it can. Raises UserError."""
    writers: list[tuple[str, Callable[[Path], str]]] = []
    for method in methods:
        if method == "merged_16bit":
            writers.append((method, partial(write_merged_16bit, source, dtype=args.dtype or "bf16")))
        elif method == "merged_4bit":
            check_merged_4bit()
            writers.append((method, partial(write_merged_4bit, source)))
        elif method == "lora":
            check_lora(source)
            writers.append((method, partial(write_lora, source)))
        else:
            writers.append((method, partial(write_all_gguf, source, quants=check_gguf(source, args.quant or "f16"))))
    return writers


def check_gguf(source: Source, quant: str) -> list[str]:
    """The requested quantisations, after checking that model and tokenizer can be written so. Raises UserError."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("to: gguf needs the package gguf, which is not installed. pip install gguf.")
    from grpo.export.gguf_file import QUANTS, check_quants
    from grpo.export.gguf_model import check_architecture
    from grpo.export.gguf_tokenizer import check_tokenizer

    quants = split(quant, "quant", QUANTS)
    check_quants(quants)
    check_architecture(source.config)
    check_tokenizer(source.tokenizer)
    return quants


def write_all_gguf(source: Source, folder: Path, quants: list[str]) -> str:
    """Write one file for each quantisation, model-<quant>.gguf. Returns a line about them."""
    from grpo.export.gguf_file import (
        BY_LLAMA_CPP,
        WRITTEN_HERE,
        contents,
        has_llama_cpp,
        quantize,
        tokenizer_problem,
        write_gguf,
    )

    folder.mkdir(parents=True, exist_ok=True)
    model = source.model()
    name = str(source.state["config"].get("run_name") or "model")
    f16 = folder / "model-f16.gguf"
    # f16 and q8_0; f16 is also the source of the K-quants
    for quant in WRITTEN_HERE:
        if quant in quants or (quant == "f16" and set(quants) & set(BY_LLAMA_CPP)):
            path = folder / f"model-{quant}.gguf"
            write_gguf(path, quant, model, source.tokenizer, name, source.recipe.end_of_turn)
    for quant in quants:
        if quant in BY_LLAMA_CPP:
            quantize(f16, folder / f"model-{quant}.gguf", quant)
    if "f16" not in quants:
        f16.unlink(missing_ok=True)
    add_recipe(source, folder)
    kinds = {quant: contents(folder / f"model-{quant}.gguf") for quant in quants}
    matrices = "; ".join(f"{q}: {' + '.join(f'{n} {kind}' for kind, n in kinds[q].items())}" for q in quants)
    if not has_llama_cpp():
        return f"matrices of {matrices}; the tokenizer was not tried in llama.cpp, which is not installed"
    problem = tokenizer_problem(folder / f"model-{quants[0]}.gguf", model, source.tokenizer, source.recipe.questions)
    if problem is not None:
        raise UserError(f"to: gguf is not written: {problem}. Use --to merged_16bit.")
    return f"matrices of {matrices}; llama.cpp cuts text into the same tokens"


def export(args: argparse.Namespace) -> None:
    """Write all requested methods, or nothing. Raises UserError."""
    methods = split(args.to, "to", METHODS)
    check_out(args.out)
    source = Source(choose(args.checkpoint, Path()), args.for_serving)
    if args.for_serving:
        source.tokenizer  # noqa: B018  refuses before weights are read
    writers = prepare(source, methods, args)
    metrics, written = card.read_metrics(source.raw_config, source.step, args.metrics), []
    with written_whole(args.out) as folder:
        for method, write in writers:
            written.append(f"{method}: {write(folder if len(writers) == 1 else folder / method)}")
        if not (folder / "MANIFEST.json").exists():
            write_manifest(folder, source.step)
        (folder / "README.md").write_text(
            card.card_text(source.state["config"], source.step, methods, metrics), encoding="utf-8"
        )
    for line in written:
        print(line, flush=True)
    size = sum(path.stat().st_size for path in files_in(args.out))
    print(f"exported {args.checkpoint} to {args.out}: {size / 1e6:.1f} MB", flush=True)


def main(argv: list[str]) -> int:
    """Export, and push with --push. Returns the exit code."""
    try:
        args = parse(argv)
        check(args)
        token = find_token("push") if args.push and not args.dry_run else None
        quiet()
        if args.to:
            export(args)
        if args.push:
            print(push.push(args.out, args.push, not args.public, token, args.dry_run), flush=True)
        return 0
    except UserError as error:
        warn(f"error: {error}")
        return error.code
