"""The command that serves: the web demo, and what programs ask."""

from pathlib import Path
from typing import Annotated, Any

import typer

from imagegen.catalog import EMBEDDED
from imagegen.cli.shell import DeviceOption, DtypeOption, ModelOption, PlanOption, app, check_writable, load_model, takes_source


@app.command()
@takes_source
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind to; default: 127.0.0.1, with --public all.")] = None,
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 7860,
    out: Annotated[Path, typer.Option(help="Where the demo writes its pictures.")] = Path("imagegen-pictures"),
    public: Annotated[bool, typer.Option("--public", help="Let others come, who know the token.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name by which others may ask; again for another.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="IMAGEGEN_TOKEN", help="The API key of programs and the page's password; --public needs one."),
    ] = None,
    safety: Annotated[
        str | None,
        typer.Option(help="MODULE:FUNCTION of (prompt, picture): why a picture may not be shown, or None; previews are grey."),
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="How many requests may wait; more are told that the server is busy.")] = 32,
    max_batch: Annotated[int, typer.Option(help="How many pictures of several requests are made at once.")] = 8,
    loras: Annotated[Path | None, typer.Option(help="A folder of LoRA files that the page offers.")] = None,
    references: Annotated[Path | None, typer.Option(help="A folder of reference sets that the page offers.")] = None,
    compare_with: Annotated[
        list[str] | None, typer.Option("--compare-with", help="Another model to compare with: as --model; again for another.")
    ] = None,
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = "exact",
    *,
    where: dict[str, Any],
) -> None:
    """Start the web demo, and OpenAI's image calls at /v1.

    Example: imagegen serve --port 7860

    Example for others: IMAGEGEN_TOKEN=… imagegen serve --public --allow-host pictures.example.org --safety checks:look
    """
    check_writable(out)
    from imagegen.server import check_rules, find_safety, launch

    check_rules(host, public, allow_host or (), token)
    check = find_safety(safety) if safety else None
    if public and check is None:
        print("imagegen: no safety check looks at the pictures: --safety MODULE:FUNCTION names one", flush=True)
    launch(
        load_model(model, device, dtype, plan, where), host=host, port=port, output_dir=out,
        loras=loras, references=references, models=compare_with or (),
        public=public, allow_hosts=allow_host or (), token=token, safety=check, max_waiting=max_waiting, max_batch=max_batch,
    )  # fmt: skip
