"""`spillway-fleet`: the admin's program. One file a command; this one reads arguments and prints results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cloud_sync.deployment import WHOLE_SHARE
from cloud_sync.errors import CloudError
from cloud_sync.fleet.deploy import Wish, deploy, public_key
from cloud_sync.fleet.enrol import Enrolment, enrol
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import ROLES, FleetConfig, Home, Lifetimes
from cloud_sync.fleet.initialise import initialise
from cloud_sync.fleet.pool_key import make_pool_key
from cloud_sync.fleet.progress import Progress
from cloud_sync.fleet.publish import publish
from cloud_sync.fleet.refresh import refresh
from cloud_sync.fleet.rotate import rotate
from cloud_sync.fleet.show import show
from cloud_sync.objects import StorageSettings

Report = dict[str, Any]


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
    return 0


def _print(options: argparse.Namespace, report: Report) -> None:
    if options.json:
        print(msgspec.json.encode(report).decode())
        return
    for line in _lines(report):
        print(line)


def _lines(value: Report, indent: str = "") -> list[str]:
    lines: list[str] = []
    for name, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{name}:", *_lines(item, indent + "  ")]
        else:
            text = item if isinstance(item, str) else msgspec.json.encode(item).decode()
            lines.append(f"{indent}{name}: {text}")
    return lines


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
    _deploy_arguments(command("deploy", _deploy, "decide what a group's boxes run"))
    _enrol_arguments(command("enrol", _enrol, "make a box's key, certificate and settings"))
    pool = command("pool-key", _pool_key, "make the key pair of a pool of gateways")
    pool.add_argument("name")
    pool.add_argument("--out", type=Path, required=True, help="file for the private key")
    command("refresh", _refresh, "sign again what runs out; run it daily")
    command("rotate", _rotate, "give a role a new key").add_argument("role", choices=ROLES)
    command("show", _show, "show what is published and deployed")
    return parser


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="the fleet's folder, instead of --home")
    parser.add_argument("--repository", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument("--endpoint", default="", help="S3 endpoint URL, for a store that is not AWS")
    parser.add_argument("--region", default="")
    parser.add_argument("--credentials", default="", help="AWS credentials file (default: the environment)")
    parser.add_argument("--profile", default="default")
    for role in ROLES:
        days = getattr(Lifetimes(), role)
        parser.add_argument(f"--{role}-days", type=int, default=days, help=f"life of a signature (default: {days})")


def _publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the model's files and spillway.toml")
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--threads", type=int, default=1, help="threads to record golden answers with")
    parser.add_argument("--dry-run", action="store_true", help="do all but upload and sign")


def _deploy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group")
    parser.add_argument("models", nargs="*", metavar="MODEL=VERSION")
    parser.add_argument("--share", type=float, default=100.0, help="percent of the group's boxes (default: 100)")
    parser.add_argument("--window", default="", help="when boxes may change over, for instance 02:00-04:00")
    parser.add_argument("--remove", action="append", default=[], metavar="MODEL")
    parser.add_argument("--halt", action="append", default=[], metavar="MODEL")
    parser.add_argument("--resume", action="append", default=[], metavar="MODEL")
    parser.add_argument("--pool", action="append", default=[], metavar="NAME=KEY", help="public key, or its file")
    parser.add_argument("--remove-pool", action="append", default=[], metavar="NAME")


def _enrol_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device")
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
    return publish(
        Home(options.home),
        options.folder,
        options.name,
        options.version,
        progress=Progress(quiet=options.json),
        dry_run=options.dry_run,
        threads=options.threads,
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
