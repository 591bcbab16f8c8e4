"""`solo web`: a page in the browser, to show a model images and talk about them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, quiet_libraries
from solo_vlm.utils.errors import SoloError


def web(
    model: Annotated[str, typer.Option(help="Folder or hub id of a SOLO model.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    host: Annotated[
        str, typer.Option(help="0.0.0.0: every machine of the network may use it.")
    ] = "127.0.0.1",
    max_image_mib: Annotated[int, typer.Option(min=1, help="Largest image file.")] = 20,
    max_megapixels: Annotated[int, typer.Option(min=1, max=100, help="Largest image.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
) -> None:
    """Open a page for the browser: drop an image, see its patches, talk about it."""
    quiet_libraries()
    try:
        import uvicorn

        from solo_vlm.serve.page.app import make_app
    except ModuleNotFoundError as error:
        raise SoloError(f"the page needs {error.name}: pip install 'solo-vlm[web]'") from error
    from solo_vlm.generate import Answerer, PrefixCache
    from solo_vlm.serve.address import take_address
    from solo_vlm.serve.page.limits import Limits
    from solo_vlm.serve.page.service import Service

    limits = Limits(
        image_bytes=max_image_mib * 2**20, pixels=max_megapixels * 10**6, new_tokens=max_new_tokens
    )
    with take_address(host, port) as address:
        answerer = Answerer.load(model, prefix_cache=PrefixCache())
        app = make_app(Service(answerer, "/".join(Path(model).parts[-2:]), limits))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        address.listen()
        STDOUT.print(f"solo web: {address.url}  (Ctrl-C ends it)", highlight=False)
        uvicorn.Server(config).run(sockets=[address.socket])
