"""The `graft` command: submit, watch and bring home fine-tunes from a terminal.

Exit codes: 0 done; 1 the watched job, the merge or the tested webhook failed; 2 something the user can correct; 3 the
watched job was cancelled; 4 the service is at fault, or does not answer. With --json standard output holds JSON and
nothing else: one document, or one a line where there are several.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from graft_client import tables
from graft_client.client import DEFAULT_URL, GraftClient
from graft_client.doctor import doctor
from graft_client.errors import AnswerUnreadable, GraftAPIError, GraftClientError, ServiceUnreachable
from graft_client.progress import watch as show_progress
from graft_client.reports import report_view
from graft_client.spec_files import read_spec
from graft_client.terminal import console, escape, harmless

PLUGINS = "graft.commands"  # entry points that add commands: `up`, `keys`, `backup` and others come from graft-local
EXIT_FAILED, EXIT_USER_ERROR, EXIT_CANCELLED, EXIT_SERVICE_ERROR = 1, 2, 3, 4
EXIT_OF_STATUS = {"succeeded": 0, "failed": EXIT_FAILED, "cancelled": EXIT_CANCELLED}
PATIENCE_SECONDS = 5.0  # someone sits in front of it


class _Commands(TyperGroup):
    """Our commands, and those of plugins, imported only when they are needed; a plugin's goes before ours."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys([*super().list_commands(ctx), *_plugins()]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (plugin := _plugins().get(cmd_name)) is None:
            return super().get_command(ctx, cmd_name)
        loaded = plugin.load()
        adapted = loaded if isinstance(loaded, typer.Typer) else typer.Typer(add_completion=False)
        if adapted is not loaded:
            adapted.command(cmd_name)(loaded)
        command = typer.main.get_command(adapted)
        command.name = cmd_name
        return command


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=PLUGINS), key=lambda point: point.name)}


app = typer.Typer(
    cls=_Commands,
    name="graft",
    help="Fine-tune language models with QLoRA on your own GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="The service is found at GRAFT_URL (http://127.0.0.1:8000), with the key in GRAFT_API_KEY. "
    "Exit codes: 0 done, 1 the job failed, 2 yours to correct, 3 cancelled, 4 the service is at fault or away.",
)

webhooks_app = typer.Typer(help="How a job's end is told to a receiver of yours.", no_args_is_help=True)
app.add_typer(webhooks_app, name="webhooks")
files = typer.Typer(help="Look at datasets.", no_args_is_help=True)
app.add_typer(files, name="files")
adapter = typer.Typer(help="What a job has learnt.", no_args_is_help=True)
app.add_typer(adapter, name="adapter")
app.command()(doctor)

FileId = Annotated[str, typer.Argument(metavar="FILE", help="The file's id, file-…")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, ftjob-…")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer as JSON.")]
SpecPath = Annotated[
    str, typer.Argument(metavar="SPEC", help="A JSON or YAML file with the job's spec; - reads standard input.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting: --set training.max_steps=100, --set 'lora.target_modules=[q_proj]' (repeatable).",
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="A JSONL file to upload, or the id of one; becomes dataset.file."),
]


@app.command()
def submit(
    spec: SpecPath,
    data: Data = None,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", "--wait", help="Follow the job to its end.")] = False,
    key: Annotated[str | None, typer.Option("--idempotency-key", help="The same key never makes two jobs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Post a fine-tuning job."""
    body = read_spec(spec, overrides or [])
    with _client() as client:
        if data is not None:
            body["dataset"] = {"file": _file_id(client, data)}
        with _asking_for_data(body):
            job = client.submit(body, idempotency_key=key)
        if not watch:
            _answer(job, tables.job_table(job), as_json=as_json)
            return
        _notice(f"Job {job['id']} is accepted ({job['status']}).")
        _follow(client, job["id"], as_json=as_json)


@app.command()
def get(job: JobId, as_json: AsJson = False) -> None:
    """Show one job."""
    with _client() as client:
        found = client.get(job)
        _answer(found, tables.job_table(found), as_json=as_json)


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Only jobs on this base model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with _client() as client:
        pages = client.list(status=status, base_model=base_model, page_size=min(limit, 100))
        jobs = list(islice(pages, limit))
        _answer(jobs, tables.jobs_table(jobs), as_json=as_json)


@app.command()
def watch(job: JobId, as_json: AsJson = False) -> None:
    """Follow a job to its end: exit code 0 succeeded, 1 failed, 3 cancelled. A paused job is waited for."""
    with _client() as client:
        _follow(client, job, as_json=as_json)


@app.command()
def cancel(job: JobId, as_json: AsJson = False) -> None:
    """End a job before its time."""
    with _client() as client:
        found = client.cancel(job)
        _answer(found, tables.job_table(found), as_json=as_json)


@app.command()
def pause(job: JobId, as_json: AsJson = False) -> None:
    """Stop a job for a while: it saves what it has learnt, leaves its worker and keeps its place."""
    with _client() as client:
        found = client.pause(job)
        _answer(found, tables.job_table(found), as_json=as_json)


@app.command()
def resume(job: JobId, as_json: AsJson = False) -> None:
    """Let a paused job go on."""
    with _client() as client:
        found = client.resume(job)
        _answer(found, tables.job_table(found), as_json=as_json)


@app.command()
def delete(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB…", help="Ids of jobs that have ended.")],
    as_json: AsJson = False,
) -> None:
    """Remove jobs that have ended, with their history and their artifacts."""
    with _client() as client:
        for job in jobs:
            client.delete(job)
            print(json.dumps({"id": job, "deleted": True}) if as_json else f"{job} is deleted.", flush=True)


@app.command()
def checkpoints(job: JobId, as_json: AsJson = False) -> None:
    """List what a job has saved, newest first."""
    with _client() as client:
        found = list(client.checkpoints(job))
        _answer(found, tables.checkpoints_table(found), as_json=as_json)


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the log of a job's last run, also while it runs."""
    said = ""
    with _client() as client:
        for said in client.follow_logs(job) if follow else (client.logs(job),):
            text = json.dumps({"job": job, "log": said}) + "\n" if as_json else harmless(said)
            print(text, end="", flush=True)
    if not said and not as_json:
        _notice(f"The log of {job} is empty: graft get {job} shows how it stands, GET /jobs/{job}/events its history.")


@webhooks_app.command("show")
def show_webhooks(job: JobId, as_json: AsJson = False) -> None:
    """Show what was sent about a job's end, and how far it has come."""
    with _client() as client:
        found = list(client.webhooks(job))
        _answer(found, tables.rows_table(found), as_json=as_json)


@webhooks_app.command("secret")
def show_webhook_secret(as_json: AsJson = False) -> None:
    """Print what webhooks are signed with; the receiver verifies by it."""
    with _client() as client:
        secret = client.webhook_secret()
        _answer({"secret": secret}, secret, as_json=as_json)


@webhooks_app.command("test")
def test_webhook(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the receiver listens.")], as_json: AsJson = False
) -> None:
    """Send a message that is about nothing; exit code 1 where it is not taken."""
    with _client() as client:
        found = client.test_webhook(url)
        said = "It was taken." if found["delivered"] else f"It was not taken: {found['reason']}"
        _answer(found, said, as_json=as_json)
        sys.exit(0 if found["delivered"] else EXIT_FAILED)


@adapter.command("show")
def show_adapter(job: JobId, as_json: AsJson = False) -> None:
    """Show the files of a job's adapter, with their proofs."""
    with _client() as client:
        found = client.adapter(job)
        _answer(found, tables.rows_table(tables.without(found["files"], "url")), as_json=as_json)


@adapter.command("download")
@app.command()
def download(
    job: JobId,
    to: Annotated[Path | None, typer.Option("--to", help="The folder to make; ./JOB by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a job's adapter home, every byte checked."""
    with _client() as client:
        folder = client.download(job, to or Path(job))
        _answer({"job": job, "path": str(folder)}, f"Adapter of {job} is in {folder}", as_json=as_json)


@app.command()
def merge(
    job: JobId,
    to: Annotated[Path | None, typer.Option("--to", help="The folder to make; ./JOB-merged by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge a job's adapter into its base in full precision, and bring it home; exit code 1 where it cannot be made."""
    with _client() as client:
        if client.merge(job)["status"] != "succeeded":
            _notice(f"The adapter of {job} is being merged.")
        merged = client.wait_merged(job)
        if merged["status"] != "succeeded":
            _die(merged["error"]["message"], EXIT_FAILED)
        folder = client.download_merged(job, to or Path(f"{job}-merged"))
        _answer({"job": job, "path": str(folder)}, f"The merged model of {job} is in {folder}", as_json=as_json)


@app.command()
def estimate(spec: SpecPath, data: Data = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show where a job would go, what would fill the card and, if its speed is known, how long it would take."""
    body = read_spec(spec, overrides or [])
    with _client() as client:
        if data is not None:
            body["dataset"] = {"file": _file_id(client, data)}
        with _asking_for_data(body):
            found = client.estimate(body)
        if found.get("fits") is False and not as_json:
            raise GraftAPIError.from_refusal(found)
        _answer(found, tables.estimate_view(found), as_json=as_json)
        sys.exit(EXIT_USER_ERROR if found.get("fits") is False else 0)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the base models."""
    with _client() as client:
        found = client.models()
        _answer(found, tables.models_table(found["data"]), as_json=as_json)


@app.command()
def capacity(as_json: AsJson = False) -> None:
    """Show the GPU classes, their free memory and the workers alive."""
    with _client() as client:
        found = client.capacity()
        _answer(found, tables.rows_table(found["data"]), as_json=as_json)


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JSONL file.")],
    direct: Annotated[bool, typer.Option("--direct", help="Send it to the bucket itself, through a link.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send a dataset; prints its id for dataset.file."""
    with _client() as client:
        found = client.upload_directly(file) if direct else client.upload(file)
        _answer(found, found["id"], as_json=as_json)


@files.command("list")
def list_files(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 20, as_json: AsJson = False
) -> None:
    """List what was uploaded, newest first."""
    with _client() as client:
        found = list(islice(client.files(page_size=min(limit, 100)), limit))
        _answer(found, tables.rows_table(found), as_json=as_json)


@files.command("show")
def show_file(file: FileId, as_json: AsJson = False) -> None:
    """Show what is known of a file."""
    with _client() as client:
        found = client.file(file)
        _answer(found, tables.rows_table([found]), as_json=as_json)


@files.command("delete")
def delete_file(file: FileId, as_json: AsJson = False) -> None:
    """Remove a file that no job has to read any more."""
    with _client() as client:
        client.delete_file(file)
        _answer({"id": file, "deleted": True}, f"{file} is deleted.", as_json=as_json)


@files.command()
def report(
    data: Annotated[str, typer.Argument(metavar="FILE", help="A JSONL file to upload, or the id of one.")],
    base_model: Annotated[str, typer.Option(help="The base whose tokenizer and chat template read the rows.")],
    revision: Annotated[str | None, typer.Option(help="Of the base.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Where rows are cut, in tokens.")] = None,
    validation_split: Annotated[float | None, typer.Option(help="The share of rows that a job would hold out.")] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="FILE", help="A JSONL file to validate on, or the id of one.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split; a job's training.seed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job on a base would learn from a dataset, before any GPU is taken."""
    with _client() as client:
        found = client.report(
            _file_id(client, data),
            base_model=base_model,
            revision=revision,
            max_length=max_length,
            validation_split=validation_split,
            validation_file=_file_id(client, validation) if validation is not None else None,
            seed=seed,
        )
        if as_json:
            _answer(found, None, as_json=True)
        else:
            console().print(report_view(found["report"]))


def main() -> None:
    """Run the command and turn every expected error into a message and an exit code."""
    try:
        app()
    except GraftAPIError as error:
        tables.print_error(console(stderr=True), error)
        sys.exit(EXIT_USER_ERROR if error.is_users else EXIT_SERVICE_ERROR)
    except (AnswerUnreadable, ServiceUnreachable) as error:
        _die(str(error), EXIT_SERVICE_ERROR)
    except GraftClientError as error:
        _die(str(error))
    except OSError as error:
        _die(f"{error.filename2 or error.filename or 'A file or folder'} cannot be used: {error.strerror or error}.")
    except UnicodeEncodeError as error:
        _die(f"What was asked for is no text, by the character {error.object[error.start : error.end]!r} in it.")


def _file_id(client: GraftClient, data: str) -> str:
    """The id of the data: as it was typed, or of the same bytes where they are, now or from an earlier command."""
    path = Path(data)
    if not path.is_file():
        if data.startswith("file-"):
            return data
        _die(f"There is no file {data}.")
    if (known := _uploaded(client, path)) is not None:
        _notice(f"{data} was uploaded before: {known['id']}")
        return str(known["id"])
    file_id: str = client.upload(path)["id"]
    _notice(f"{data} is uploaded: {file_id}")
    return file_id


@contextmanager
def _asking_for_data(spec: dict[str, Any]) -> Iterator[None]:
    """The service says that a dataset is required; how one is given here, it cannot know."""
    try:
        yield
    except GraftAPIError as error:
        if error.param == "dataset" and "dataset" not in spec:
            error.message += " Give --data ROWS.jsonl, or name one in the spec."
        raise


def _uploaded(client: GraftClient, path: Path) -> dict[str, Any] | None:
    try:
        return client.uploaded(path)
    except GraftAPIError as error:
        if error.status != 403:
            raise
        return None  # a key may be for writing files, and not for reading them


@contextmanager
def _client() -> Iterator[GraftClient]:
    url, key = os.environ.get("GRAFT_URL") or DEFAULT_URL, os.environ.get("GRAFT_API_KEY") or None
    with GraftClient(url, key, patience_seconds=PATIENCE_SECONDS) as client:
        yield client


def _follow(client: GraftClient, job_id: str, *, as_json: bool) -> NoReturn:
    updates, job = client.updates(job_id), dict[str, Any]()
    if as_json:
        for update in updates:
            job = update.job
            print(json.dumps(job), flush=True)
    else:
        job = show_progress(updates, console())
        tables.print_whole(console(), tables.job_table(job))
        if job["status"] == "succeeded":
            _notice(f"Next: graft download {job_id}")
    sys.exit(EXIT_OF_STATUS[job["status"]])


def _answer(document: Any, shown: Any, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        tables.print_whole(console(), escape(shown) if isinstance(shown, str) else shown)


def _notice(text: str) -> None:
    console(stderr=True).print(escape(text), soft_wrap=True)


def _die(message: str, code: int = EXIT_USER_ERROR) -> NoReturn:
    console(stderr=True).print(f"[red]error[/red] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)
