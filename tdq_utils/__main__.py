"""The long jobs as commands: ``python -m tdq_utils --help``."""

import sys
from argparse import ArgumentDefaultsHelpFormatter as Defaults
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tdq_utils as tdq
from tdq_utils.errors import DataError, TDQError, check, check_folder

SHOWN = ("question", "variant", "rule", "steps", "method", "weights_method", "weights", "activations", "repeat", "iterations",
         "step_rate", "generator_rate", "split_skips", "mse", "fcd", "fid", "kid", "seconds")  # fmt: skip
BELONGS = {"quick": "ptq, qat", "steps": "quickstart, ptq, qat", "iterations": "qat, trials",
           **dict.fromkeys(("methods", "weights", "activations", "picture"), "quickstart")}  # fmt: skip

DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAININGS = {
    "train-unet": ("Train the shipped denoiser.", "iterations", 5400),
    "train-dit": ("Train the second denoiser that ships, a transformer with classes.", "iterations", 8000),
    "train-classifier": ("Train the feature classifier and measure the reference statistics.", "epochs", 8),
}


def demo(args: Namespace) -> None:
    """Execute the quickstart from scratch, print its table, write it as a page."""
    import nbformat
    from nbclient import NotebookClient

    from tdq_utils.show.site import write_page

    source = _checkout() / "notebooks" / "00_quickstart.ipynb"
    notebook = nbformat.read(source, as_version=4)
    print(f"Executing {source} (one to two minutes on two CPU cores) ...", flush=True)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": source.parent}}).execute()
    shown = [output for cell in notebook.cells if "headline" in cell.metadata.get("tags", []) for output in cell.outputs]
    print("\n".join(output.get("text") or output.data["text/plain"] for output in shown))
    write_page(notebook, page := args.out / "quickstart.html")
    print(f"The rendered notebook, which opens without a network: {page.resolve()}")


def _checkout() -> Path:
    if not ((root := Path(__file__).resolve().parents[1]) / "notebooks").is_dir():
        raise DataError(f"This command needs the notebooks, which lie in the repository; got {root}. Clone it.")
    return root


def exercises(args: Namespace) -> None:
    """Write the students' notebooks and the solved ones, from one source a lesson; or run and judge what students hand in."""
    from tdq_utils.show import exercises as kit

    for path in args.check or ():
        said = kit.verdicts(path)
        right = sum(sentence.startswith("right") for sentence in said.values())
        others = [f"  {name}: {sentence}" for name, sentence in said.items() if not sentence.startswith("right")]
        print("\n".join([f"{path}: {right} of {len(said)} right", *others]), flush=True)
    if not args.check:
        made = kit.write(kit.EXERCISES, args.out)
        print(f"{len(made) // 2} notebooks for students: {kit.EXERCISES.resolve()}\nthe same, solved: {args.out.resolve()}")


def train(args: Namespace) -> None:
    """Train one of ``TRAININGS``: the options of each are the arguments of its function."""
    from tdq_utils.lab import training

    options = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    found = getattr(training, args.command.replace("-", "_"))(**options)
    print(f"EMA weights: {found}" if isinstance(found, Path) else f"Test accuracy {found:.4f}; written to {args.out}")


def _load(args: Namespace, device: Any = None) -> tuple[Any, Any]:
    return tdq.load_model(args.model, device, args.scheduler, DTYPES[args.dtype])


def calibrate(args: Namespace) -> None:
    """Quantize a model, calibrate it on its own trajectory, and save it as a folder."""
    from tdq_utils.lab.protocol import Protocol

    model, scheduler = _load(args)
    tdq.quantize(model, args.weights, args.activations, args.method, split_skips=args.split_skips)
    seeds = range(args.first_seed, args.first_seed + args.images)
    asking = Protocol(guidance=args.guidance, classes=args.classes).asking(model, seeds)
    tdq.calibrate(model, scheduler, seeds, args.steps, reconstruct=args.reconstruct, weights_method=args.weights_method, **asking)
    tdq.save_quantized(model, args.out)
    print(f"W{args.weights}A{args.activations}, {args.method}: {args.out}; read it with load_quantized({str(args.out)!r})")


def reproduce(args: Namespace) -> None:
    """Measure a table; a row that is there already is not measured again."""
    from tdq_utils.lab import reproduce as engine
    from tdq_utils.lab.protocol import Reference
    from tdq_utils.lab.tables import ablations, balance, ptq, qat, quickstart, trials

    for option, tables in BELONGS.items():
        if getattr(args, option) not in (None, False) and args.table not in tables.split(", "):
            raise TDQError(f"--{option} belongs to {tables}; got {args.table}, which fixes its own. Leave it out.")
    args.weights, args.activations = args.weights or 8, args.activations or [5, 6]
    steps, iterations = args.steps or (10 if args.quick else 20), args.iterations or (30 if args.quick else 600)
    jobs_of: dict[str, Callable[[], Sequence[Any]]] = {
        "quickstart": partial(quickstart.quickstart_jobs, args.methods, args.weights, args.activations, steps),
        "ptq": partial(ptq.ptq_jobs, args.quick, steps),
        "qat": partial(qat.qat_jobs, args.quick, steps, iterations),
        "ablations": ablations.ablation_jobs,
        "balance": balance.balance_jobs,
        "trials": partial(trials.trial_jobs, args.iterations or 150),
    }
    jobs, state = jobs_of[args.table](), engine.processes()
    model, scheduler = _load(args, state.device if state.device.type == "cuda" else None)
    protocol = engine.Protocol(Reference(args.data, args.root, args.download), args.guidance, args.classes)
    out = Path(str(args.out).replace("TABLE", args.table + "-quick" * args.quick))
    images = args.images or (128 if args.quick else 256 if args.table in ("quickstart", "trials") else 1000)
    cache = args.cache or out.parent / "cache"
    table = engine.reproduce(jobs, model, scheduler, out, images, args.batch_size, args.features, cache, args.engine,
                             args.mix_threads, state.is_main_process, protocol)  # fmt: skip
    if state.is_main_process:
        shown = table[[name for name in SHOWN if name in table]].to_string(index=False, float_format="%.3g")
        print(f"{shown}\nWritten to {out}")
        if args.table == "qat":
            qat.add_losses(out.with_name(f"{out.stem}_loss.csv"), jobs, protocol.folder(cache, model, scheduler), model)
        if args.picture:
            _draw(args, model, scheduler, steps)


def _draw(args: Namespace, model: Any, scheduler: Any, steps: int) -> None:
    """The README's picture: drift, and what intervals do to the same seeds."""
    from tdq_utils.lab.tables.quickstart import CALIBRATION_SEEDS

    profile, bits = tdq.profile_activations(model, scheduler, CALIBRATION_SEEDS, steps), min(args.activations)
    settings = [(method, args.weights, bits) for method in ("minmax", "mse", "tdq")]
    _, images = tdq.compare(model, scheduler, settings, range(80), steps, profile)  # a distance needs more than 64
    tdq.plots.set_style()
    layer = profile.drift(bits).set_index("layer").ratio.drop(index=tdq.kept_layers(model)).idxmax()
    named = {tdq.NAMES[method]: pictures for (method, *_), pictures in images.items()}
    tdq.profile_plots.drift_and_rescue(profile, layer, named, bits).savefig(args.picture)


def report(args: Namespace) -> None:
    """Will an interval over t help a model? Measure it on the model's own trajectory, and write a page."""
    from tdq_utils.lab.sensitivity import class_labels, record_sampling

    for bits in (args.weights, args.activations):
        tdq.Grid(bits)  # before anything is sampled
    model, scheduler = tdq.load_model(args.model)
    condition = class_labels(model)
    recorded = record_sampling(model, scheduler, args.steps, args.images, condition)
    found = tdq.report(recorded, args.out, scheduler, args.weights, args.activations, steps=args.steps, condition=condition)
    print("\n".join([*found["verdict"], f"The page, which opens without a network: {(args.out / 'index.html').resolve()}"]))


def explorer(args: Namespace) -> None:
    """Write the page on which a reader drags the interval of any layer at any t; as .json.xz, one model's statistics for it."""
    from tdq_utils.show import explorer

    models = [explorer.measure(name, args.images, args.steps) for name in args.measure] if args.measure else explorer.shipped()
    explorer.write(models, args.out)
    print(f"{', '.join(model['title'] for model in models)}: {args.out.resolve()}, which opens without a network")


def site(args: Namespace) -> None:
    """Write lessons, explorer, tables and cards as a folder of pages that open without a network and without a kernel."""
    from tdq_utils.show import site

    print(f"{site.build(_checkout(), args.out)} pages; open {(args.out / 'index.html').resolve()}")


def bench(args: Namespace) -> None:
    """Cost of profiling, of simulation and of integers, as ratios; time by kind of work; memory."""
    from tdq_utils.lab import bench

    model, scheduler = _load(args)
    variants = bench.integer_variants(model, scheduler, args.steps)
    how = dict(images=args.images, steps=args.steps)
    tables = {"bench.csv": bench.bench_integer(variants, scheduler, repeats=args.repeats, **how)}
    chosen = {label: variants[label] for label in ("fp32, eager", "fp32, compiled", "int8, TDQ table")}
    tables["bench_time.csv"] = bench.where_time_goes(chosen, tables["bench.csv"], scheduler, **how)
    tables["bench_memory.csv"] = bench.memory(model, scheduler, variants["int8, static"], **how)
    tables["bench_eager.csv"] = bench.bench(model, scheduler, repeats=args.repeats, **how)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.assign(machine=bench.machine()).to_csv(args.out / name, index=False, float_format="%.4g")
        print(f"\n{args.out / name}: {bench.machine()}\n{table.round(3).to_string(index=False)}")


def parser() -> ArgumentParser:
    """The command line."""
    top = ArgumentParser(prog="python -m tdq_utils", description="Quantization of diffusion models over time steps.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(function: Callable, out: str, model: bool = True, name: str = "", what: str | None = None) -> ArgumentParser:
        sub = commands.add_parser(name or function.__name__, help=what or function.__doc__, formatter_class=Defaults)
        sub.set_defaults(run=function)
        sub.add_argument("--out", type=Path, default=Path(out), help="where the results go")
        if model:
            sub.add_argument("--model", default="fashion-mnist", help="short name, folder or hub id")
            sub.add_argument("--scheduler", help="DDIM, or another of diffusers (default: the model's own)")
            sub.add_argument("--dtype", choices=list(DTYPES)[1:], help="of weights (default: as stored)")
        return sub

    command(demo, "runs", model=False)
    command(exercises, "build/solutions", model=False).add_argument("--check", type=Path, nargs="+", help="notebooks to judge")
    for name, (what, loops, count) in TRAININGS.items():
        sub = command(train, f"runs/{name.removeprefix('train-')}", False, name, what)
        _numbers(sub, **{loops: (count, "of training")}, seed=(0, "of weights and data order"))
        sub.add_argument("--root", type=Path, help="folder with the full Fashion-MNIST (IDX files)")
        if loops == "iterations":
            _numbers(sub, batch=(128, "images an iteration"))
        if name == "train-unet":
            sub.add_argument("--compile", dest="compiled", action="store_true",
                             help="through torch.compile (needs a C++ compiler)")  # fmt: skip
            sub.add_argument("--device", default="cpu", help="cpu or cuda")
    sub = command(calibrate, "runs/calibrated")
    sub.add_argument("--method", default="tdq", help="how step sizes are chosen: one of calibrate's methods")
    _numbers(sub, weights=(8, "bits"), activations=(8, "bits"), images=(32, "trajectories that calibration sees"),
             first_seed=(10_000, "of the trajectories"), steps=(20, "sampling steps of a trajectory"))  # fmt: skip
    sub.add_argument("--reconstruct", default="input", help="input, block or noise: the error that learned step sizes descend")
    sub.add_argument("--split-skips", action="store_true", help="quantize the halves of concatenated skip inputs apart")
    sub.add_argument("--weights-method", help="adaround: learn how each weight is rounded (default: to the nearest level)")
    _asking_options(sub)
    _reproduce_options(command(reproduce, "runs/TABLE.csv"))
    _numbers(command(report, "runs/report"), weights=(8, "bits"), activations=(6, "bits, where one number is shown"),
             images=(32, "trajectories that are recorded"), steps=(20, "of sampling"))  # fmt: skip
    sub = command(explorer, "runs/explorer.html", model=False)
    sub.add_argument("--measure", nargs="+", metavar="MODEL",
                     help="short names, folders or hub ids, two minutes each (default: what ships)")  # fmt: skip
    _numbers(sub, images=(64, "trajectories that are recorded"), steps=(20, "of sampling"))
    command(site, "build/site", model=False)
    _numbers(command(bench, "runs/bench"), repeats=(15, "timed rounds"), images=(64, "a batch"), steps=(5, "of a timed run"))
    return top


def _numbers(sub: Any, **options: tuple[int | None, str]) -> None:
    """Options that are whole numbers: ``name=(default, help)``."""
    for name, (default, what) in options.items():
        sub.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=what)


def _asking_options(sub: Any) -> None:
    sub.add_argument("--classes", type=int, help="classes that images go through, seed by seed (default: the model's)")
    sub.add_argument("--guidance", type=float, help="w of classifier-free guidance (default: none)")


def _reproduce_options(sub: ArgumentParser) -> None:
    sub.add_argument("table", choices=["quickstart", "ptq", "qat", "ablations", "balance", "trials"],
                     help="a few intervals; post-training; training; ablations of TDQ; channels; trials of training")  # fmt: skip
    sub.add_argument("--cache", type=Path, help="folder for full-precision images and trainings (default: beside the CSV)")
    sub.add_argument("--quick", action="store_true", help="few bits, once, 128 images, 10 steps: minutes")
    _numbers(sub, images=(None, "a row (default: 1000, quickstart and trials 256, quick 128)"),
             steps=(None, "sampling steps (default: 20, quick 10)"), batch_size=(16, "images at a time; hundreds on a GPU"),
             iterations=(None, "of training (default: qat 600, quick 30; trials 150)"))  # fmt: skip
    sub.add_argument("--features", default="classifier", help="classifier (FCD) or inception (FID; needs the extra of that name)")
    sub.add_argument("--engine", default="eager", help="eager, compiled: simulation; integer: int8; the last two need g++")
    sub.add_argument("--mix-threads", action="store_true", help="add to rows of another number of threads")
    other = sub.add_argument_group("other models")
    other.add_argument("--data", default="fashion-mnist", help="what distances compare with: fashion-mnist, cifar10, or a folder")
    other.add_argument("--root", help="folder with the official files of --data")
    other.add_argument("--download", action="store_true", help="fetch missing files of --data")
    _asking_options(other)
    few = sub.add_argument_group("quickstart")
    few.add_argument("--methods", nargs="*", help="how step sizes are chosen (default: minmax, mse, learned, table, tdq)")
    few.add_argument("--weights", type=int, help="bits (default: 8)")
    few.add_argument("--activations", type=int, nargs="+", help="bits (default: 5 6)")
    few.add_argument("--picture", type=Path, help="also draw drift and rescue, at the fewest bits")


COUNTS = ("images", "steps", "iterations", "epochs", "batch", "batch_size", "repeats", "classes")


def _check(args: Namespace) -> None:
    """Refuse numbers and places of any command, before it loads anything. TDQError: one is out of range, or no place."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    check("count", **{f"--{name.replace('_', '-')}": given[name] for name in COUNTS if name in given})
    for name in {"weights", "activations"} & given.keys():
        for bits in given[name] if isinstance(given[name], list) else [given[name]]:
            tdq.Grid(bits)
    check("amount", **{f"--{name.replace('_', '-')}": given[name] for name in ("seed", "first_seed") if name in given})
    check_folder(args.out.parent if args.out.suffix else args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends with its message and status 2."""
    args = parser().parse_args(argv)
    try:
        _check(args)
        args.run(args)
    except (TDQError, ModuleNotFoundError) as error:
        more = "" if isinstance(error, TDQError) else ". Commands need the extras: pip install 'tdq-utils[lab,show,notebooks]'."
        print(f"error: {error}{more}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
