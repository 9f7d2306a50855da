"""`python -m graft_api.tenants`: see what tenants have, and change their quotas and shares. In force at once."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence

from graft_api.keys.static import TENANT
from graft_api.settings import ApiSettings
from graft_api.texts import in_columns
from graft_shared.errors import GraftError
from graft_shared.store import Quota, Quotas, Tenants, TenantUse, open_database

DEFAULT = "default"
_WHAT = {
    Quota.QUEUED_JOBS: "jobs that wait",
    Quota.RUNNING_JOBS: "jobs that train at once",
    Quota.GPU_HOURS: "hours of training in a month",
    Quota.STORED_BYTES: "bytes of uploaded files",
}
_MOST = {Quota.QUEUED_JOBS: 10**9, Quota.RUNNING_JOBS: 10**9, Quota.GPU_HOURS: 10**9, Quota.STORED_BYTES: 10**18}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what was asked, and show the tenants that it is about."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    settings = ApiSettings()
    database = open_database(settings.database)
    tenants = Tenants(database, Quotas.of(settings))
    try:
        shown = tenants.list() if asked.command == "list" else [tenants.set(asked.tenant, _changes(asked))]
    except GraftError as error:
        parser.error(error.message)
    finally:
        database.close()
    head = ("tenant", "share", *(quota.value.replace("_", " ") for quota in Quota))
    sys.stdout.write(in_columns(head, map(_row, shown)))


def _changes(asked: argparse.Namespace) -> dict[str, float | None]:
    names = ("share", *(quota.value for quota in Quota))
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    return {name: None if value == DEFAULT else value for name, value in given.items()}


def _row(tenant: TenantUse) -> tuple[str, ...]:
    of_all = [
        f"{getattr(tenant, quota.value):.{2 if quota is Quota.GPU_HOURS else 0}f} of {_limit(tenant, quota)}"
        for quota in Quota
    ]
    return (tenant.name, f"{tenant.share:g}", *of_all)


def _limit(tenant: TenantUse, quota: Quota) -> str:
    limit = getattr(tenant.quotas, quota.value)
    return "any" if limit is None else f"{limit:.10g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m graft_api.tenants", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show everybody's share, quotas, and what of them is in use")
    change = commands.add_parser("set", help="change one tenant's; what is not named stays")
    change.add_argument("tenant", type=_tenant)
    change.add_argument("--share", type=_share, help="of the workers, in proportion to others that wait; 1 is usual")
    for quota in Quota:
        change.add_argument(
            f"--{quota.value.replace('_', '-')}", type=_quota(quota), dest=quota.value, metavar="N",
            help=f"{_WHAT[quota]}; '{DEFAULT}' is what the settings say",
        )  # fmt: skip
    return parser


def _tenant(text: str) -> str:
    if not TENANT.fullmatch(text):
        raise argparse.ArgumentTypeError("a tenant's name has up to 64 letters, digits, - and _")
    return text


def _share(text: str) -> float:
    share = _number(text)
    if not 0.001 <= share <= 1000:
        raise argparse.ArgumentTypeError("a number from 0.001 to 1000")
    return share


def _quota(quota: Quota) -> Callable[[str], float | str]:
    def read(text: str) -> float | str:
        if text == DEFAULT:
            return DEFAULT
        number, most = _number(text), _MOST[quota]
        if not 0 <= number <= most:
            raise argparse.ArgumentTypeError(f"a number from 0 to {most}, or '{DEFAULT}'")
        return number if quota is Quota.GPU_HOURS else int(number)

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    main()
