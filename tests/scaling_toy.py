"""The toy sweep of the package, made small enough for a test."""

from __future__ import annotations


def toy_sweep(root):
    """Overrides: three sizes at three budgets of a few steps, and one held-out run."""
    sizes = ", ".join(
        f"w{width}: {{hidden_size: {width}, intermediate_size: {2 * width}, num_hidden_layers: {layers}, "
        f"num_attention_heads: {width // 16}, num_key_value_heads: {width // 16}}}"
        for width, layers in ((16, 1), (32, 1), (48, 2))
    )
    held = "hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4"
    return [
        f"root={root}",
        "toy_data={text: 1500, stage2: 5000, heldout_text: 20, heldout_stage2: 60}",
        f"sizes={{{sizes}}}",
        "tokens=[512, 1024, 2048]",
        f"holdout=[{{name: w64, size: {{{held}}}, tokens: 2560}}]",
        "recipe.validation.sequences=4",
    ]
