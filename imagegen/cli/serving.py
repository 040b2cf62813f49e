"""The command that serves: the web demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from imagegen.catalog import EMBEDDED
from imagegen.cli.shell import DeviceOption, DtypeOption, ModelOption, PlanOption, app, check_writable, load_model, takes_source


@app.command()
@takes_source
def serve(
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 7860,
    out: Annotated[Path, typer.Option(help="Where the demo writes its pictures.")] = Path("imagegen-pictures"),
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = "exact",
    *,
    where: dict[str, Any],
) -> None:
    """Start the web demo.

    Example: imagegen serve --port 7860
    """
    check_writable(out)
    from imagegen.studio import launch

    launch(load_model(model, device, dtype, plan, where), host=host, port=port, output_dir=out)
