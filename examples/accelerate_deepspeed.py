"""Fine-tune a SOLO model with Accelerate and DeepSpeed ZeRO, as the paper did.

    torchrun --nproc-per-node 8 examples/accelerate_deepspeed.py --model MODEL --data MIXTURE.yaml --out OUT

On a CPU: DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/accelerate_deepspeed.py ... --precision no
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, send_to_device
from transformers import get_cosine_schedule_with_warmup

from solo_vlm.data.mixture import Mixture, make_loader
from solo_vlm.models.load import load_model, load_processor
from solo_vlm.models.packed.isolation import isolate_documents


def start(zero_stage: int, batch: int, precision: str) -> Accelerator:
    """Set up the process group and DeepSpeed."""
    if not torch.accelerator.is_available():
        PartialState(cpu=True)  # otherwise Accelerate treats each process as the only one
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # one packed sequence
        "gradient_accumulation_steps": batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": zero_stage,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW, which needs no compiler
        "zero_force_ds_cpu_optimizer": False,
    }
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings), mixed_precision=precision)


def main(
    model: Annotated[Path, typer.Option(help="Folder of a SOLO model.")],
    data: Annotated[str, typer.Option(help="YAML file of a mixture or recipe.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Packed sequences per step and process.")] = 8,
    zero_stage: Annotated[int, typer.Option(help="2: shard optimizer and gradients; 3: weights, too.")] = 2,
    precision: Annotated[str, typer.Option(help="bf16 or no.")] = "bf16",
    learning_rate: float = 1e-5,
) -> None:
    """Fine-tune a SOLO model with Accelerate and DeepSpeed."""
    accelerator = start(zero_stage, batch, precision)
    processor = load_processor(model)
    solo = load_model(model, dtype="float32", device="cpu").train()
    isolate_documents(solo)
    mixture = Mixture.load(data, [f"model={model}"])
    if mixture.data.epochs:  # the loaders of the processes would end at different steps
        raise typer.BadParameter(f"{data}: remove data.epochs; --steps sets the length of the run")
    ranks = accelerator.num_processes
    loader = make_loader(mixture, processor, mixture.open_sources(), accelerator.process_index, ranks)
    optimizer = torch.optim.AdamW(solo.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.03 * steps), steps)
    engine, optimizer = accelerator.prepare(solo, optimizer)
    batches = iter(loader)  # not prepared: the loader has already split the data
    for step in range(steps):
        group = send_to_device(list(islice(batches, batch)), accelerator.device)
        supervised = sum((packed["labels"][:, 1:] != -100).sum() for packed in group)
        supervised = accelerator.reduce(supervised, "sum")  # in the global batch
        total = torch.zeros((), device=accelerator.device)
        for packed in group:
            with accelerator.accumulate(engine):
                loss = engine(**packed, use_cache=False, num_items_in_batch=supervised).loss
                # DeepSpeed averages over micro-batches and processes, but this loss is a share of a sum.
                accelerator.backward(loss * batch * ranks)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        schedule.step()
        accelerator.print(f"step {step + 1}: loss {accelerator.reduce(total, 'sum').item():.6f}")
    state = accelerator.get_state_dict(engine)  # gathers the shards of ZeRO-3
    if accelerator.is_main_process:
        accelerator.unwrap_model(engine).save_pretrained(out / "model", state_dict=state)
        processor.save_pretrained(out / "model")
    accelerator.end_training()  # DeepSpeed aborts at exit if the process group still exists


if __name__ == "__main__":
    typer.run(main)
