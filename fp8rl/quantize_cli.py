"""The command line of ``fp8rl quantize``; quantize_command.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8rl.lifeline import ends_at_once

QUANTIZE_EXAMPLES = """
Examples:

- `fp8rl quantize Qwen3-8B Qwen3-8B-FP8 --report`: blockwise FP8, and the error of every tensor

- `fp8rl quantize masters FP8 --fp32-as master`: fp32 weights, quantized from their fp32 values

- `fp8rl quantize Qwen3-8B FP8 --keep-last-layers 2 --keep 'model.layers.*.mlp.down_proj'`: keep
  some linears in BF16

- `fp8rl quantize Qwen3-8B-FP8 Qwen3-8B-back --to bf16`: back, no value changed
"""


def quantize(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Folder of a Hugging Face checkpoint: config.json and safetensors."
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="Folder to be made. Until it is complete, the work is in DST.partial beside it.",
        ),
    ],
    to: Annotated[
        Literal["fp8", "bf16"],
        typer.Option(help="fp8: E4M3 in blocks of 128x128, power-of-two scales. bf16: back."),
    ] = "fp8",
    fp32_as: Annotated[
        Literal["master", "export"] | None,
        typer.Option(
            help="What fp32 linears stand for. master: their fp32 values are quantized. export: "
            "they are rounded to BF16 first, as a BF16 checkpoint would hold them. The two give "
            "different weights, so it must be said where there are any.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Linears that stay BF16, a shell pattern on names such as "
            "'model.layers.*.mlp.down_proj'. May be given several times.",
            show_default=False,
        ),
    ] = None,
    keep_first_layers: Annotated[
        int, typer.Option(metavar="N", help="Layers at the start whose linears stay BF16.")
    ] = 0,
    keep_last_layers: Annotated[
        int, typer.Option(metavar="N", help="Layers at the end whose linears stay BF16.")
    ] = 0,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            metavar="N", help="Ranks of the engine that is to serve it, for checking shapes."
        ),
    ] = 1,
    unfit: Annotated[
        Literal["refuse", "keep"],
        typer.Option(
            help="Linears whose shape the engine cannot serve in FP8: refuse to convert, or keep "
            "them in BF16."
        ),
    ] = "refuse",
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Measure the error of every quantized tensor; table and picture go to "
            "DST/quantization_report.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace DST, and drop a DST.partial that was begun otherwise."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Convert a Hugging Face checkpoint to blockwise FP8, for vLLM and transformers, or back.

    Needs little memory, whatever the size of the model. DST appears when it is complete: after a
    kill the same command goes on where it was. The last line printed is DST. Exit codes: 0 done;
    1 a weight is NaN or Inf, or the disk failed; 2 source, destination and options do not allow it;
    130 stopped by Ctrl-C. After all but 0 there is no new DST.
    """
    with ends_at_once():
        from fp8rl import quantize_command
        from fp8rl.quant.convert_plan import ConvertOptions
    options = ConvertOptions(
        to=to,
        fp32_as=fp32_as,
        keep_first_layers=keep_first_layers,
        keep_last_layers=keep_last_layers,
        keep_patterns=tuple(keep or ()),
        tensor_parallel=tensor_parallel,
        unfit=unfit,
        report=report,
    )
    raise typer.Exit(
        quantize_command.run(source, destination, options, force=force, as_json=as_json)
    )
