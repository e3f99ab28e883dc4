"""`spillway-fleet`: the admin's program. One file a command; this one reads arguments and prints results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from cloud_sync.deployment import WHOLE_SHARE
from cloud_sync.errors import CloudError
from cloud_sync.fleet.deploy import Wish, deploy, public_key
from cloud_sync.fleet.enrol import Enrolment, enrol
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.evaluate import Trying, evaluate
from cloud_sync.fleet.home import ROLES, FleetConfig, Home, Lifetimes
from cloud_sync.fleet.initialise import initialise
from cloud_sync.fleet.kinds import TASKS
from cloud_sync.fleet.optimize import optimize
from cloud_sync.fleet.pool_key import make_pool_key
from cloud_sync.fleet.progress import Progress
from cloud_sync.fleet.publish import Wanted, publish
from cloud_sync.fleet.refresh import refresh
from cloud_sync.fleet.rotate import rotate
from cloud_sync.fleet.show import show
from cloud_sync.fleet.telling import lines_of
from cloud_sync.objects import StorageSettings
from models.optimize.recipes import STEPS

Report = dict[str, Any]

_MAX_DROP: Final = (
    "how much worse than the first variant another may be: 0.01 is a hundredth of accuracy, or 1 %% of error"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 it could not be done, 2 it was not understood."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], Report] = options.command
    try:
        report = command(options)
    except (FleetError, CloudError) as error:
        code = error.code if isinstance(error, CloudError) else "refused"
        _print_error(options, code, str(error))
        return 1
    except OSError as error:
        _print_error(options, "disk", str(error))
        return 1
    _print(options, report)
    return 1 if report.get("refused") else 0


def _print(options: argparse.Namespace, report: Report) -> None:
    if options.json:
        print(msgspec.json.encode(report).decode())
        return
    for line in lines_of(report):
        print(line)


def _print_error(options: argparse.Namespace, code: str, message: str) -> None:
    if options.json:
        print(msgspec.json.encode({"error": {"code": code, "message": message}}).decode())
    print(f"spillway-fleet: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", type=Path, default=Path("fleet"), help="the fleet's folder (default: ./fleet)")
    common.add_argument("--json", action="store_true", help="print one line of JSON")
    parser = argparse.ArgumentParser(prog="spillway-fleet", description="Publish models to a fleet of boxes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Report], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=text, description=text)
        added.set_defaults(command=run)
        return added

    _init_arguments(command("init", _init, "make keys, a certificate authority and an empty repository"))
    _publish_arguments(command("publish", _publish, "publish a folder as a version of a model"))
    _evaluate_arguments(command("evaluate", _evaluate, "measure a model's variants on a labelled set, side by side"))
    _optimize_arguments(command("optimize", _optimize, "make smaller and faster variants of a model's ONNX graphs"))
    _deploy_arguments(command("deploy", _deploy, "decide what a group's boxes run"))
    _enrol_arguments(command("enrol", _enrol, "make a box's key, certificate and settings"))
    pool = command("pool-key", _pool_key, "make the key pair of a pool of gateways")
    pool.add_argument("name", help="the pool's name, as boxes' configurations give it")
    pool.add_argument("--out", type=Path, required=True, help="file for the private key")
    command("refresh", _refresh, "sign again what runs out; run it daily")
    command("rotate", _rotate, "give a role a new key").add_argument("role", choices=ROLES, help="whose key is changed")
    command("show", _show, "show what is published and deployed")
    return parser


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="the fleet's folder, instead of --home")
    parser.add_argument("--repository", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument("--endpoint", default="", help="S3 endpoint URL, for a store that is not AWS")
    parser.add_argument("--region", default="", help="S3 region (default: the environment's)")
    parser.add_argument("--credentials", default="", help="AWS credentials file (default: the environment)")
    parser.add_argument("--profile", default="default", help="profile in the credentials file (default: default)")
    for role in ROLES:
        days = getattr(Lifetimes(), role)
        parser.add_argument(f"--{role}-days", type=int, default=days, help=f"life of a signature (default: {days})")


def _publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a model's folder as it was exported, or one .onnx or .tflite file")
    parser.add_argument("--name", default="", help="the model's name on boxes (default: the folder's)")
    parser.add_argument("--version", default="", help="the version's name (default: the next number)")
    _folder_arguments(parser)
    parser.add_argument(
        "--golden",
        action="append",
        default=[],
        metavar="FILE",
        help="a question (.json, .txt, .png, .jpg, .wav) that boxes must answer as this machine does; `none` for none "
        "(default: one that fits the task)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="evaluate on this labelled set first, and publish what passes the gate",
    )
    parser.add_argument("--max-drop", type=float, metavar="SHARE", help=_MAX_DROP)
    parser.add_argument("--threads", type=int, default=1, help="threads to answer with here (default: 1)")
    parser.add_argument(
        "--since",
        nargs="*",
        metavar="VERSION",
        help="make delta packs against these earlier versions; none for no deltas (default: what deployments name)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be published; upload and sign nothing")


def _folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model's folder is read."""
    parser.add_argument("--task", default="", help=f"what the model does (default: by its files): {', '.join(TASKS)}")
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,NAME",
        help="which precisions, best first: `default` for model.onnx, `int8` for model_int8.onnx (default: full "
        "precision, one of 8 bits, one of 4)",
    )


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a model's folder, or one .onnx or .tflite file")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        required=True,
        help="JSON lines with inputs (or file, or messages) and label",
    )
    _folder_arguments(parser)
    parser.add_argument("--threads", type=int, default=1, help="threads for the runtime (default: 1)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the comparison here, as SVG")
    parser.add_argument("--max-drop", type=float, metavar="SHARE", help=_MAX_DROP)


def _optimize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a model's folder, or one .onnx file")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model with its variants")
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(","),
        required=True,
        metavar="STEP,STEP+STEP",
        help=f"what to make, each of {', '.join(STEPS)} or several joined by +; `pruned-30` prunes 30 percent",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="JSON lines with inputs, for int8-static; labels are not read"
    )
    parser.add_argument("--task", default="", help="what the model does (default: by its files)")


def _deploy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", help="the group of boxes, as their configurations name it")
    parser.add_argument("models", nargs="*", metavar="MODEL=VERSION", help="what they shall run from now on")
    parser.add_argument("--share", type=float, default=100.0, help="percent of the group's boxes (default: 100)")
    parser.add_argument("--window", default="", help="when boxes may change over, for instance 02:00-04:00")
    changes = {
        "--remove": ("MODEL", "let no box of the group run it any more"),
        "--halt": ("MODEL", "let no further box take its new version"),
        "--resume": ("MODEL", "go on after --halt"),
        "--pool": ("NAME=KEY", "let boxes hand off to a pool: its public key, or the file that `pool-key` wrote"),
        "--remove-pool": ("NAME", "let no box hand off to it any more"),
    }
    for option, (metavar, text) in changes.items():
        parser.add_argument(option, action="append", default=[], metavar=metavar, help=text)


def _enrol_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="the box's name")
    parser.add_argument("--out", type=Path, required=True, help="folder for the box's files")
    parser.add_argument(
        "--group", action="append", default=[], help="a group of the box; the first decides first (default: all)"
    )
    parser.add_argument("--broker", default="", help="host of the cloud's MQTT broker")
    parser.add_argument("--port", type=int, default=8883, help="its port (default: 8883)")
    parser.add_argument("--at", default="/etc/spillway", help="where the files will lie on the box")
    parser.add_argument("--days", type=int, default=1825, help="life of the certificate (default: 1825)")


def _init(options: argparse.Namespace) -> Report:
    home = Home(options.folder or options.home)
    storage = StorageSettings(
        endpoint=options.endpoint, region=options.region, credentials=options.credentials, profile=options.profile
    )
    lifetimes = Lifetimes(**{role: getattr(options, f"{role}_days") for role in ROLES})
    return initialise(home, FleetConfig(repository=options.repository, storage=storage, lifetimes=lifetimes))


def _publish(options: argparse.Namespace) -> Report:
    wanted = Wanted(
        path=options.folder,
        name=options.name,
        version=options.version,
        task=options.task,
        variants=options.variants,
        since=options.since,
        golden=options.golden,
        data=options.data,
        max_drop=options.max_drop,
        threads=options.threads,
        dry_run=options.dry_run,
    )
    return publish(Home(options.home), wanted, Progress(quiet=options.json))


def _evaluate(options: argparse.Namespace) -> Report:
    trying = Trying(
        path=options.folder,
        data=options.data,
        task=options.task,
        variants=options.variants,
        max_drop=options.max_drop,
        plot=options.plot,
        threads=options.threads,
    )
    return evaluate(trying, Progress(quiet=options.json))


def _optimize(options: argparse.Namespace) -> Report:
    return optimize(
        options.folder,
        options.out,
        options.variants,
        calibration=options.calibration,
        task=options.task,
        progress=Progress(quiet=options.json),
    )


def _deploy(options: argparse.Namespace) -> Report:
    pools: dict[str, list[str]] = {}
    for text in options.pool:
        name, key = _pair(text)
        pools.setdefault(name, []).append(public_key(key))
    wish = Wish(
        versions=dict(_pair(text) for text in options.models),
        share=_share(options.share),
        window=options.window,
        remove=options.remove,
        halt=options.halt,
        resume=options.resume,
        pools=pools,
        remove_pools=options.remove_pool,
    )
    return deploy(Home(options.home), options.group, wish)


def _share(percent: float) -> int:
    if not 0 <= percent <= 100:
        raise FleetError(f"a share of {percent} % is not between 0 and 100")
    return round(percent * WHOLE_SHARE / 100)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise FleetError(f"{text!r} is not NAME=VALUE")
    return name, value


def _enrol(options: argparse.Namespace) -> Report:
    asked = Enrolment(
        device=options.device,
        groups=options.group or ["all"],
        broker=options.broker,
        port=options.port,
        at=options.at,
        days=options.days,
    )
    return enrol(Home(options.home), asked, options.out)


def _pool_key(options: argparse.Namespace) -> Report:
    return make_pool_key(Home(options.home), options.name, options.out)


def _refresh(options: argparse.Namespace) -> Report:
    return refresh(Home(options.home))


def _rotate(options: argparse.Namespace) -> Report:
    return rotate(Home(options.home), options.role)


def _show(options: argparse.Namespace) -> Report:
    return show(Home(options.home))


if __name__ == "__main__":
    sys.exit(main())
