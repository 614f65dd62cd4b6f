"""The command line: `ao COMMAND` and `ao-pack`.

Torch and the extension are loaded after the arguments are parsed, so that `--help` answers at once.
Exit codes: 0 done; 1 measured and not met; 2 bad input or usage; 3 failed at run time; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ao import config as configs
from ao.config import DataConfig, EvalConfig, ModelConfig, PlanOptions, Recipe, TrainConfig, load_recipe

if TYPE_CHECKING:
    from ao.oracle import Answer

# Sources and tasks are tables of the recipe, not flags; the annotations are changed here because tyro is slow to import.
DataConfig.__annotations__["sources"] = Annotated[tuple[configs.SourceConfig, ...], tyro.conf.Suppress]
EvalConfig.__annotations__["tasks"] = Annotated[tuple[configs.TaskConfig, ...], tyro.conf.Suppress]


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Build a packed data set from a recipe's sources.

    "Pack" means: render, tokenize, align and lay out in shards. (Joining several sequences in one row comes later: `ao
    plan`.) A build goes on in OUT.partial, which becomes OUT when it is whole; the same recipe and files give the same
    bytes, in one go, in parts or resumed. `ao inspect OUT` shows what is in it.
    """

    recipe: tyro.conf.Positional[Path]
    """The recipe, a TOML file; the sources' paths are taken from its folder, all others from the working directory."""
    out: Path | None = None
    """Folder of the packed data set, instead of data.out."""
    part: str = "0/1"
    """i/n: build only every n-th shard from the i-th on, i from 0, for n processes or machines that write into one folder;
    --merge joins them."""
    merge: bool = False
    """Prove that the parts in OUT.partial are all there, whole and of one build, that of this recipe and its flags, and
    make them OUT."""
    resume: bool = False
    """Go on with a build, or a part, that was stopped: shards that are finished are checked and kept. Nothing is done
    where OUT is whole already; if a file of it is missing or has another size, or a version of ao with other rules
    built it, it is built anew."""
    max_errors: int = 0
    """Pass over this many bad rows, counted by reason, before stopping; each part counts its own."""
    json: bool = False
    """One JSON object on stdout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show a packed data set or its datapoints, and check that it is whole. Exits with 1 where --verify finds a problem.

    Also says what an unfinished build, a shard, a plan, activations, an adapter or a run's folder is, and what to do with it.
    """

    path: tyro.conf.Positional[Path]
    """The packed data set."""
    row: tuple[int, ...] = ()
    """Show these datapoints, counted from 0; -1 is the last."""
    id: tuple[str, ...] = ()
    """Show the datapoints of these examples."""
    verify: bool = False
    """Check every checksum, the structure, the contents and the counts."""
    model: str | None = None
    """Folder or Hub id of the model whose tokenizer gives the texts; without it the one that the data set names, if it is
    on this machine."""
    plot: Path | None = None
    """PNG file to draw lengths and answers into."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True, kw_only=True)
class Plan(PlanOptions):
    """Show how full rows of some token budgets would be, or write the plan of one epoch.

    Exits with 1 where no budget is possible: each is less than the longest datapoint has, or no step is filled.
    """

    packed: tyro.conf.Positional[Path]
    """The packed data set."""
    tokens_per_row: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Token budgets of a row to compare; one with --out."""
    out: Path | None = None
    """File of the plan, a safetensors file."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Run the target over contexts and keep its activations in a cache. On several devices: torchrun ... -m ao collect ...

    Collects what the recipe's packed data set reads, or every token of --texts or of --prompt. What the cache holds
    already is passed over, so the same command goes on after a kill, and a second data set collects only what is new.
    `ao inspect OUT` shows what is there.
    """

    recipe: tyro.conf.Positional[Path]
    """The recipe, a TOML file; names the model."""
    out: Path | None = None
    """Folder of the cache; `activations` beside data.out without one."""
    data: Path | None = None
    """The packed data set; data.out of the recipe without one."""
    texts: Path | None = None
    """Instead: a JSONL file, an object with text or messages a line."""
    prompt: str | None = None
    """Instead: one user turn."""
    layers: tuple[str, ...] = ()
    """Indices or depths; those that the data set reads, or data.read_depths, without any."""
    positions: Literal["wanted", "all"] = "wanted"
    """wanted: the tokens that the data set reads; all: every token of its contexts."""
    adapter: Path | None = None
    """LoRA adapter that the target wears while it reads."""
    dtype: Literal["BF16", "F16", "F32"] | None = None
    """Type of the rows; what the model computes in without one."""
    format: Literal["cache", "safetensors"] = "cache"
    """safetensors: plain files for other tools, of F32 without --dtype; docs/activations.md shows how they are read."""
    tokens_per_row: int = 8192
    """Token budget of one forward."""
    import_tensor: Path | None = None
    """Instead of running a target: a safetensors file with a tensor [tokens, layers, d_model]; with --sidecar."""
    sidecar: Path | None = None
    """JSON file that says what the tensor of --import-tensor is."""
    json: bool = False
    """One JSON object on stdout."""
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train an oracle's adapter on a packed data set. On several devices: torchrun --nproc-per-node N -m ao train ..."""

    recipe: tyro.conf.Positional[Path]
    """The recipe, a TOML file."""
    data: Path | None = None
    """The packed data set; data.out of the recipe without one."""
    out: Path | None = None
    """Folder of the adapter, instead of train.out."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    restart: bool = False
    """Begin anew where the folder holds an unfinished run; what it left goes when the first step is done."""
    json: bool = False
    """One JSON object on stdout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score an oracle on the recipe's held-out tasks, each beside its controls."""

    recipe: tyro.conf.Positional[Path]
    """The recipe, a TOML file."""
    adapter: str | None = None
    """Folder or Hub id of the adapter; train.out of the recipe without one."""
    out: Path | None = None
    """Folder of records and report, instead of eval.out."""
    fail_under: float | None = None
    """Exit with 1 if the lower end of any task's gain interval lies below this."""
    json: bool = False
    """One JSON object on stdout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Ask an oracle about the activations of a prompt."""

    prompt: tyro.conf.Positional[str]
    """What the target reads: a user turn, or with --raw plain text."""
    question: tyro.conf.Positional[str]
    """What to ask about its activations."""
    adapter: str = "runs/demo/adapter"
    """Folder or Hub id of the oracle's adapter."""
    base: str = "demo"
    """Hub id or folder of the base."""
    target: str | None = None
    """Checkpoint to read, where that is another, fully tuned model."""
    system: str | None = None
    """A system turn before the prompt."""
    raw: bool = False
    """Read the prompt as plain text, without chat turns."""
    probe: str = "full_seq"
    """Tokens to read: full_seq, token:-1, segment:-10: and the like."""
    layer: str | None = None
    """Layer index, depth such as 0.5, or "all"; the adapter's default without one."""
    choices: tuple[str, ...] = ()
    """Answers to choose from."""
    samples: int = 0
    """Draw this many answers; their agreement is the confidence."""
    control: Literal["no_activation", "text", "none"] = "no_activation"
    """What to ask beside it: no_activation, text or none."""
    precision: Literal["nf4", "nf4-dequantized", "bf16", "fp32"] | None = None
    """How the frozen weights are held; bf16 without one ("demo": fp32)."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Let the target answer prompts, for context prediction on its own words (`within = "assistant"`)."""

    recipe: tyro.conf.Positional[Path]
    """The recipe, a TOML file; names the model."""
    prompts: Path
    """Texts or chats: JSONL, Parquet, CSV or a text file."""
    out: Path
    """JSONL file of the chats; prompts that it answers already are passed over."""
    text: str = "text"
    """Column of the prompts' text."""
    count: int | None = None
    """Prompts taken, from the first one on; all without a number."""
    max_new_tokens: int = 200
    """Longest answer."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    persona_share: float = 0.5
    """Share of the prompts that get a persona as system turn."""
    personas: Path | None = None
    """Text file, a persona a line, instead of the built-in ones."""
    seed: int = 0
    """Keys personas and answers."""
    json: bool = False
    """One JSON object on stdout."""
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload an adapter to the Hugging Face Hub, once it is proved whole: weights, settings, contract, record, recipe, card.

    Checkpoints and logs stay. Wants a token: `hf auth login`, or HF_TOKEN.
    """

    folder: tyro.conf.Positional[Path]
    """The adapter's folder."""
    repository: tyro.conf.Positional[str]
    """OWNER/NAME on the Hub; made if it does not exist."""
    dry_run: bool = False
    """Check, and say what would be uploaded, without any network."""
    private: bool = False
    """Make the repository private; one that exists must be so already."""
    report: Path | None = None
    """report.json of `ao eval`, whose table goes into the card; the folder's own without one."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Pack, train, score and ask an oracle on the embedded demo world: two minutes on a laptop."""

    seed: int = 0
    """Keys what is held out, the data, the adapter's start and the report."""
    out: Path = Path("runs/demo")
    """Folder of everything the demo leaves."""
    size: Literal["tiny", "large"] = "tiny"
    """tiny: the target embedded in the package; large: one of 140 M parameters, first trained into OUT/target, on a GPU."""
    device: str = "auto"
    """"auto" (the CPU for tiny, a GPU for large), "cpu", "cuda" or "cuda:N"."""
    precision: Literal["nf4", "nf4-dequantized", "bf16", "fp32"] | None = None
    """How the frozen weights are held; fp32 on a CPU and nf4 on a GPU without it."""
    rebuild_target: bool = False
    """Train the target again from nothing, into OUT/target, and use that one."""
    json: bool = False
    """One JSON object on stdout."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `ao`."""
    commands = {
        "demo": Demo,
        "collect": Collect,
        "train": Train,
        "ask": Ask,
        "eval": Eval,
        "pack": Pack,
        "plan": Plan,
        "inspect": Inspect,
        "rollouts": Rollouts,
        "push": Push,
    }
    _run(commands, list(sys.argv[1:] if args is None else args), program="ao")


def pack_main(args: Sequence[str] | None = None) -> None:
    """Entry point of `ao-pack`."""
    _run({"ao-pack": Pack}, ["ao-pack", *(sys.argv[1:] if args is None else args)], program="ao-pack")


def _run(commands: dict[str, type], args: list[str], *, program: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    handlers: dict[type, Callable[..., dict[str, Any]]] = {
        Pack: _pack,
        Plan: _plan,
        Inspect: _inspect,
        Collect: _collect,
        Train: _train,
        Eval: _eval,
        Ask: _ask,
        Demo: _demo,
        Rollouts: _rollouts,
        Push: _push,
    }
    as_json = "--json" in args
    command: Any = None
    try:
        try:
            command = _parse(commands, args, program)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
        raise SystemExit(0) from None
    except SystemExit as stop:
        if as_json and stop.code:
            print(json.dumps({"error": "usage; stderr says what", "kind": "UsageError", "exit_code": stop.code}))
        raise
    except (ValueError, FileNotFoundError) as error:
        _fail(error, 2, as_json)
    try:
        _require_one_process(command)
        result = handlers[type(command)](command)
    except (
        *(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IndexError),
        ModuleNotFoundError,  # an extra that the user asked for
    ) as error:
        _fail(error, 2, as_json)
    except (RuntimeError, OSError, MemoryError) as error:
        _fail(error, 3, as_json)
    except KeyboardInterrupt:
        _fail(KeyboardInterrupt("interrupted"), 130, as_json)
    except SystemExit:
        raise
    # A crash, a panic in Rust among them, keeps its traceback, but must not exit with 1, which is a verdict.
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        _fail(error, 3, as_json)
    else:
        if command.json and result:
            _write(json.dumps(result))
        if isinstance(command, Eval) and command.fail_under is not None:
            short = [task["name"] for task in result["tasks"] if task["gain_interval"][0] < command.fail_under]
            if short:
                print(f"gain below {command.fail_under}: {', '.join(short)}", file=sys.stderr)
                raise SystemExit(1)
        if isinstance(command, Plan) and not any(each["plan"] and each["plan"]["steps"] for each in result["budgets"]):
            raise SystemExit(1)
        if isinstance(command, Inspect) and not result.get("ok", True):
            raise SystemExit(1)


def _require_one_process(command: object) -> None:
    """Refuse ranks where each would do all of the work, and write the same files."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not isinstance(command, Train | Collect):
        raise ValueError(
            f"{type(command).__name__.lower()}: {ranks} ranks were started, but only train and collect share their work among "
            "ranks; start one process"
        )


def _fail(error: BaseException, code: int, as_json: bool) -> None:
    print(f"error: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": code}))
    raise SystemExit(code)


def _parse(commands: dict[str, type], args: list[str], program: str) -> Any:
    """Parse twice where there is a recipe: its values are the defaults of the flags."""
    kind = commands.get(args[0]) if args else None
    if kind is None:
        return tyro.extras.subcommand_cli_from_dict(commands, prog=program, args=args or ["--help"])
    rest, program = args[1:], " ".join(dict.fromkeys((program, args[0])))
    names = set(kind.__dataclass_fields__)
    if "recipe" not in names or {"-h", "--help"} & set(rest):
        return tyro.cli(kind, args=rest, prog=program)
    files = [arg for arg in rest if arg.endswith(".toml")]
    if not files:
        named = tyro.cli(kind, args=rest, prog=program).recipe
        raise ValueError(f"{named}: a recipe is a TOML file, and its name ends in .toml; rename it")
    recipe = load_recipe(files[0])
    parts = {name: getattr(recipe, name) for name in ("model", "data", "train", "eval") if name in names}
    if kind is not Pack:
        parts.pop("data", None)
    asked = {name: tyro.MISSING for name in ("prompts", "out") if name in names and kind is Rollouts}
    return tyro.cli(kind, default=kind(recipe=Path(files[0]), **parts, **asked), args=rest, prog=program)


def _recipe(command: Pack | Collect | Train | Eval | Rollouts) -> Recipe:
    """The recipe with the command's flags put in."""
    parts = {
        name: value
        for name in ("model", "data", "train", "eval")
        if isinstance(value := getattr(command, name, None), configs.Config)
    }
    return replace(load_recipe(command.recipe), **parts)


def _pack(command: Pack) -> dict[str, Any]:
    from ao.pack import merge, pack
    from ao.summary import summary_text

    recipe = _recipe(command)
    if command.merge:
        building = ("part", "resume", "max_errors")
        if given := [name for name in building if getattr(command, name) != getattr(Pack, name)]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"--merge with {flags}: a merge builds nothing; give {flags} to the parts, then merge alone"
            )
        summary = merge(recipe, out=command.out)
    else:
        summary = pack(
            recipe,
            root=command.recipe.parent,
            out=command.out,
            part=_part(command.part),
            resume=command.resume,
            max_errors=command.max_errors,
            progress=True,
        )
    if not command.json:
        print(summary_text(summary))
    return summary


def _part(text: str) -> tuple[int, int]:
    index, _, num = text.partition("/")
    if not (index.isdecimal() and num.isdecimal() and int(index) < int(num)):
        raise ValueError(f"--part {text!r}: expected i/n with i from 0 below n, such as 0/8 to 7/8")
    return int(index), int(num)


def _plan(command: Plan) -> dict[str, Any]:
    from ao.plan import command as plan
    from ao.plan import table

    own = ("packed", "tokens_per_row", "out", "json")
    settings = {name: value for name, value in vars(command).items() if name not in own}
    result = plan(command.packed, command.tokens_per_row, out=command.out, **settings)
    if not command.json:
        print(table(result["budgets"]))
    return result


def _inspect(command: Inspect) -> dict[str, Any]:
    from ao.inspection import inspect, text

    result = inspect(
        command.path,
        rows=command.row,
        ids=command.id,
        check=command.verify,
        model=command.model,
        plot=command.plot,
        progress=sys.stderr.isatty(),
    )
    if not command.json:
        is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
        encoding = sys.stdout.encoding or "utf-8"
        # What the terminal cannot write is written as its code.
        _write(text(result, color=is_terminal).encode(encoding, "backslashreplace").decode(encoding))
    return result


def _write(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _close_stdout()


def _close_stdout() -> None:
    """`head` or a pager has seen enough: what is still to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _collect(command: Collect) -> dict[str, Any]:
    from ao.collect.imported import import_tensor
    from ao.collect.run import collect, summary_text
    from ao.collect.wanted import units

    recipe = _recipe(command)
    out = command.out or Path(recipe.data.out).with_name("activations")
    if (command.import_tensor is None) != (command.sidecar is None):
        raise ValueError("--import-tensor and --sidecar belong together; got one of them")
    if command.tokens_per_row < 1:
        raise ValueError(f"--tokens-per-row {command.tokens_per_row}: expected 1 at least")
    if command.import_tensor is not None:
        of_a_model = ("data", "texts", "prompt", "layers", "positions", "adapter", "dtype", "format", "tokens_per_row")
        if given := [name for name in of_a_model if getattr(command, name) != getattr(Collect, name)]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--import-tensor runs no model and writes a cache; leave {flags} out")
        record = import_tensor(command.import_tensor, str(command.sidecar), out=out)
    else:
        wanted = units(
            recipe,
            data=command.data,
            texts=command.texts,
            prompt=command.prompt,
            layers=[_layer(layer, flag="--layers") for layer in command.layers],
            positions=command.positions,
            plain=command.format == "safetensors",
        )
        record = collect(
            recipe.model,
            wanted,
            out=out,
            adapter=command.adapter,
            dtype=command.dtype,
            plain=command.format == "safetensors",
            tokens_per_row=command.tokens_per_row,
            progress=True,
        )
    if not record.pop("first_rank"):
        return {}
    if not command.json:
        print(summary_text(out, record))
    return {"out": str(out), **record}


def _train(command: Train) -> dict[str, Any]:
    from ao.train import train

    recipe = _recipe(command)
    record = train(
        recipe,
        data=command.data or recipe.data.out,
        out=command.out or recipe.train.out,
        resume=command.resume,
        restart=command.restart,
        root=command.recipe.parent,
    )
    if not command.json and record["first_rank"]:
        print(
            f"adapter in {command.out or recipe.train.out}: {record['steps']} steps, last loss {record['losses'][-1]}"
        )
    shown = {name: value for name, value in record.items() if name not in ("losses", "first_rank")}
    return shown if record["first_rank"] else {}


def _eval(command: Eval) -> dict[str, Any]:
    from ao.eval.report import console_table
    from ao.eval.run import evaluate
    from ao.oracle import Oracle

    recipe = _recipe(command)
    model = recipe.model
    oracle = Oracle.from_pretrained(
        model.name,
        command.adapter or recipe.train.out,
        target=model.target,
        revision=model.revision,
        target_revision=model.target_revision,
        precision=model.precision,
        device=model.device,
    )
    report = evaluate(
        oracle, recipe, root=command.recipe.parent, out=command.out or Path(recipe.eval.out), progress=True
    )
    if not command.json:
        print(console_table(report))
    return report


def _ask(command: Ask) -> dict[str, Any]:
    from ao.oracle import Oracle
    from ao.probes import Probe

    if not command.prompt.strip() or not command.question.strip():
        raise ValueError("the prompt and the question must not be empty; say what to read and what to ask about it")
    oracle = Oracle.from_pretrained(command.base, command.adapter, target=command.target, precision=command.precision)
    context: Any = command.prompt
    if command.raw and command.system is not None:
        raise ValueError("--system with --raw: plain text has no system turn; leave one of them out")
    if not command.raw:
        context = [{"role": "user", "content": command.prompt}]
        if command.system is not None:
            context.insert(0, {"role": "system", "content": command.system})
    activations = oracle.read(context)
    answers = oracle.ask(
        activations[Probe.parse(command.probe).positions(len(activations)).tolist()],
        command.question,
        choices=command.choices or None,
        layer=_layer(command.layer),
        control=None if command.control == "none" else command.control,
        samples=command.samples,
    )
    answers = answers if isinstance(answers, list) else [answers]
    if not command.json:
        for answer in answers:
            print(_line(answer))
    return {"question": command.question, "answers": [_plain(answer) for answer in answers]}


def _rollouts(command: Rollouts) -> dict[str, Any]:
    from ao.rollouts import PERSONAS, rollouts

    personas = PERSONAS
    if command.personas is not None:
        personas = tuple(filter(None, map(str.strip, command.personas.read_text(encoding="utf-8").splitlines())))
    record = rollouts(
        _recipe(command).model,
        prompts=command.prompts,
        out=command.out,
        text=command.text,
        count=command.count,
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        persona_share=command.persona_share,
        personas=personas,
        seed=command.seed,
        progress=True,
    )
    if not command.json:
        print("\n".join(f"{name:>10}  {value}" for name, value in record.items()))
    return record


def _push(command: Push) -> dict[str, Any]:
    from ao.push import push, summary_text

    result = push(
        command.folder,
        command.repository,
        private=command.private,
        report=command.report,
        dry_run=command.dry_run,
    )
    if not command.json:
        print(summary_text(result))
    return result


def _demo(command: Demo) -> dict[str, Any]:
    from ao.demo.run import demo

    return demo(
        seed=command.seed,
        out=command.out,
        size=command.size,
        device=command.device,
        precision=command.precision,
        rebuild_target=command.rebuild_target,
        quiet=command.json,
    )


def _layer(text: str | None, *, flag: str = "--layer") -> Any:
    several = flag == "--layer"
    if text is None or (several and text == "all"):
        return text
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        expected = "an index such as 3, a depth such as 0.5" + (', or "all"' if several else "")
        raise ValueError(f"{flag} {text!r}: expected {expected}") from None


def _line(answer: Answer) -> str:
    sure = "" if answer.confidence is None else f" ({answer.confidence:.2f})"
    beside = "" if answer.control is None else f"   [control: {answer.control.text}]"
    return f"layer {answer.layer}: {answer.text}{sure}{beside}"


def _plain(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "layer": answer.layer,
        "confidence": answer.confidence,
        "probabilities": answer.probabilities,
        "control": None if answer.control is None else _plain(answer.control),
    }
