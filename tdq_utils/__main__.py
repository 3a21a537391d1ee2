"""The long jobs as commands: ``python -m tdq_utils --help``."""

import argparse
import sys
from functools import partial
from pathlib import Path

from tdq_utils.errors import TDQError


def demo(args):
    """Execute the quickstart from scratch, print its table, write it as a page."""
    import nbformat
    from nbclient import NotebookClient

    from tdq_utils.show.site import write_page

    source = Path(__file__).resolve().parents[1] / "notebooks" / "00_quickstart.ipynb"
    notebook = nbformat.read(source, as_version=4)
    print(f"Executing {source} (one to two minutes on two CPU cores) ...", flush=True)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": source.parent}}).execute()
    for cell in notebook.cells:
        if "headline" in cell.metadata.get("tags", []):
            print("\n".join(output.get("text") or output.data["text/plain"] for output in cell.outputs))
    page = args.out / "quickstart.html"
    write_page(notebook, page)
    print(f"The rendered notebook, which opens without a network: {page.resolve()}")


def train_unet(args):
    """Train the shipped denoiser."""
    from tdq_utils.lab.training import train_unet as train

    folder = train(args.out, args.iterations, args.batch, args.seed, root=args.root, compiled=args.compile, device=args.device)
    print(f"EMA weights: {folder}")


def train_classifier(args):
    """Train the feature classifier and measure the reference statistics."""
    from tdq_utils.lab.training import train_classifier as train

    print(f"Test accuracy {train(args.out, args.epochs, seed=args.seed, root=args.root):.4f}; written to {args.out}")


def compare(args):
    """Compare quantizers on a model: rows of distances as CSV, optionally a picture."""
    from tdq_utils.denoiser.loading import load_model
    from tdq_utils.denoiser.recording import profile_activations
    from tdq_utils.fit.quantize import kept_layers
    from tdq_utils.lab.tables.quickstart import CALIBRATION_SEEDS, compare
    from tdq_utils.show import plots, profile_plots
    from tdq_utils.show.names import NAMES
    from tdq_utils.show.tables import headline

    model, scheduler = load_model(args.model)
    settings = [(method, args.weights, bits) for bits in args.activations for method in args.methods]
    profile = profile_activations(model, scheduler, CALIBRATION_SEEDS, args.steps)
    table, images = compare(model, scheduler, settings, seeds=range(args.images), steps=args.steps, profile=profile)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False, float_format="%.6g")
    print(headline(table))
    print(f"Written to {args.out}")
    if args.picture:
        bits = min(args.activations)
        keys = {"full precision": (None, None), **dict.fromkeys(("minmax", "mse", "tdq"), (args.weights, bits))}
        rows = {NAMES[method]: images[method, *key] for method, key in keys.items()}
        plots.set_style()
        layer = profile.drift(bits).set_index("layer").ratio.drop(index=kept_layers(model)).idxmax()
        profile_plots.drift_and_rescue(profile, layer, rows, bits).savefig(args.picture)


def calibrate(args):
    """Quantize a model, calibrate it on its own trajectory, and save it as a folder."""
    from tdq_utils import load_model, quantize, save_quantized
    from tdq_utils.fit.calibration import calibrate as choose_steps

    model, scheduler = load_model(args.model)
    quantize(model, args.weights, args.activations, args.method, split_skips=args.split_skips)
    choose_steps(model, scheduler, range(args.first_seed, args.first_seed + args.images), args.steps,
                 reconstruct=args.reconstruct, weights_method=args.weights_method)  # fmt: skip
    save_quantized(model, args.out)
    print(f"W{args.weights}A{args.activations}, {args.method}: {args.out}; read it with load_quantized({str(args.out)!r})")


SHOWN = ("question", "variant", "steps", "method", "weights_method", "weights", "activations", "repeat", "iterations",
         "step_rate", "generator_rate", "split_skips", "mse", "fcd", "fid", "kid", "seconds")  # fmt: skip


def reproduce(args):
    """Measure a table of the paper; a row that is there already is not measured again."""
    from tdq_utils.denoiser.loading import load_model
    from tdq_utils.lab.reproduce import default_cache, processes
    from tdq_utils.lab.reproduce import reproduce as measure
    from tdq_utils.lab.tables.ablations import ablation_jobs
    from tdq_utils.lab.tables.ptq import ptq_jobs
    from tdq_utils.lab.tables.qat import add_losses, loss_curves, qat_jobs
    from tdq_utils.lab.tables.trials import trial_jobs

    if args.table in ("ablations", "trials") and (args.quick or args.steps):
        raise TDQError(f"--quick and --steps belong to ptq and qat; {args.table} fixes its own. Leave them out.")
    if args.iterations is not None and (args.table not in ("qat", "trials") or args.iterations < 1):
        raise TDQError(f"--iterations belongs to qat and trials, and must be 1 or more; got {args.iterations} for {args.table}.")
    state = processes()
    model, scheduler = load_model(args.model, device=state.device if state.device.type == "cuda" else None)
    out = args.out or Path("runs") / (f"{args.table}-quick.csv" if args.quick else f"{args.table}.csv")
    images = args.images or (128 if args.quick else 256 if args.table == "trials" else 1000)
    steps = args.steps or (10 if args.quick else 20)
    cache = args.cache or default_cache(out)
    how = dict(batch_size=args.batch_size, features=args.features, cache=cache, engine=args.engine,
               progress=state.is_main_process)  # fmt: skip
    iterations = args.iterations or (30 if args.quick else 150 if args.table == "trials" else 600)
    make = {"ptq": partial(ptq_jobs, args.quick, steps), "qat": partial(qat_jobs, args.quick, steps, iterations),
            "ablations": ablation_jobs, "trials": partial(trial_jobs, iterations)}  # fmt: skip
    jobs = make[args.table]()
    table = measure(jobs, model, scheduler, out, images, **how)
    if state.is_main_process:
        print(table[[name for name in SHOWN if name in table]].to_string(index=False, float_format="%.3g"))
        print(f"Written to {out}")
    if state.is_main_process and args.table == "qat":
        losses = out.with_name(f"{out.stem}_loss.csv")
        add_losses(losses, loss_curves(jobs, cache, model))
        print(f"Losses of the trainings: {losses}")


def bench(args):
    """Cost of profiling, of simulation and of integers, as ratios; time by kind of work; memory."""
    from tdq_utils import load_model
    from tdq_utils.lab import bench

    model, scheduler = load_model(args.model)
    print(bench.machine())
    variants = bench.integer_variants(model, scheduler, args.steps)
    how = dict(images=args.images, steps=args.steps)
    tables = {"bench.csv": bench.bench_integer(variants, scheduler, repeats=args.repeats, **how)}
    chosen = {label: variants[label] for label in ("fp32, eager", "fp32, compiled", "int8, TDQ table")}
    medians = tables["bench.csv"].groupby("variant").seconds.first()
    tables["bench_time.csv"] = bench.where_time_goes(chosen, medians, scheduler, **how)
    tables["bench_memory.csv"] = bench.memory(model, scheduler, variants["int8, static"], **how)
    tables["bench_eager.csv"] = bench.bench(model, scheduler, repeats=args.repeats, **how)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.assign(machine=bench.machine()).to_csv(args.out / name, index=False, float_format="%.4g")
        print(f"\n{args.out / name}\n{table.round(3).to_string(index=False)}")


def parser():
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tdq_utils", description="Quantization of diffusion models over time steps.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(function, out, model=True):
        sub = commands.add_parser(
            function.__name__.replace("_", "-"), help=function.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=function)
        if out:
            sub.add_argument("--out", type=Path, default=Path(out), help="where the results go")
        if model:
            sub.add_argument("--model", default="fashion-mnist", help="short name, folder or hub id")
        return sub

    command(demo, "runs", model=False)
    _training_options(command(train_unet, "runs/unet", model=False), command(train_classifier, "runs/classifier", model=False))
    _compare_options(command(compare, "runs/compare.csv"))
    _calibrate_options(command(calibrate, "runs/calibrated"))
    _reproduce_options(command(reproduce, None))
    sub = command(bench, "runs/bench")
    sub.add_argument("--repeats", type=int, default=15, help="timed rounds")
    sub.add_argument("--images", type=int, default=64, help="a batch")
    sub.add_argument("--steps", type=int, default=5, help="sampling steps of a timed run")
    return top


def _training_options(unet, classifier):
    for sub, steps, default in ((unet, "iterations", 5400), (classifier, "epochs", 8)):
        sub.add_argument(f"--{steps}", type=int, default=default, help=f"{steps} of training")
        sub.add_argument("--seed", type=int, default=0, help="of weights and data order")
        sub.add_argument("--root", type=Path, help="folder with the full Fashion-MNIST (IDX files)")
    unet.add_argument("--batch", type=int, default=128, help="images an iteration")
    unet.add_argument("--compile", action="store_true", help="through torch.compile (needs a C++ compiler)")
    unet.add_argument("--device", default="cpu", help="cpu or cuda")


def _compare_options(sub):
    methods = ["minmax", "mse", "learned", "table", "tdq"]
    sub.add_argument("--methods", nargs="*", default=methods, help="how step sizes are chosen")
    sub.add_argument("--weights", type=int, default=8, help="bits")
    sub.add_argument("--activations", type=int, nargs="+", default=[6, 5], help="bits")
    sub.add_argument("--images", type=int, default=256, help="seeds 0.. of this many images")
    sub.add_argument("--steps", type=int, default=20, help="sampling steps")
    sub.add_argument("--picture", type=Path, help="also draw drift and rescue (needs minmax, mse and tdq among the methods)")


def _calibrate_options(sub):
    sub.add_argument("--method", default="tdq", help="how step sizes are chosen: one of calibrate's methods")
    sub.add_argument("--weights", type=int, default=8, help="bits")
    sub.add_argument("--activations", type=int, default=8, help="bits")
    sub.add_argument("--images", type=int, default=32, help="trajectories that calibration sees")
    sub.add_argument("--first-seed", type=int, default=10_000, help="of the trajectories")
    sub.add_argument("--steps", type=int, default=20, help="sampling steps of a trajectory")
    sub.add_argument("--reconstruct", default="input", help="input, block or noise: the error that learned step sizes descend")
    sub.add_argument("--split-skips", action="store_true", help="quantize the halves of concatenated skip inputs apart")
    sub.add_argument("--weights-method", help="adaround: learn how each weight is rounded (default: to the nearest level)")


def _reproduce_options(sub):
    sub.add_argument("table", choices=["ptq", "qat", "ablations", "trials"],
                     help="post-training quantization; training; ablations of TDQ; short trials of training")  # fmt: skip
    sub.add_argument("--out", type=Path, help="CSV, resumed if there (default: runs/TABLE.csv)")
    sub.add_argument("--cache", type=Path, help="folder for full-precision images and trainings (default: beside the CSV)")
    sub.add_argument("--quick", action="store_true", help="few bits, once, 128 images, 10 steps: minutes")
    sub.add_argument("--images", type=int, help="a row (default: 1000, trials 256, quick 128)")
    sub.add_argument("--steps", type=int, help="sampling steps (default: 20, quick 10)")
    sub.add_argument("--iterations", type=int, help="of training (default: qat 600, quick 30; trials 150)")
    sub.add_argument("--features", default="classifier", help="classifier (FCD) or inception (FID; needs the extra of that name)")
    sub.add_argument("--batch-size", type=int, default=16, help="images at a time; hundreds on a GPU")
    sub.add_argument(
        "--engine", default="eager", help="eager or compiled: simulation; integer: int8 kernels; the last two need g++"
    )


def main(argv=None):
    """Run one command; bad input ends with its message and status 2."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except TDQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
