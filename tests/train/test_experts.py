"""Auxiliary loss, load and biases of routers, against transformers' own loss and counts by hand."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.factories import (
    image_rows,
    make_llm,
    make_solo,
    read_steps,
    run_recipe,
    run_settings,
    text_rows,
    write_training_data,
)
from torch._dynamo.utils import counters
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from solo_vlm.check.tiny import text_families, tiny_llm, tiny_solo
from solo_vlm.data.collate import collate, model_inputs
from solo_vlm.data.encode import Document
from solo_vlm.models.load import load_llm, load_model
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import ROUTER_BIASES
from solo_vlm.train import Recipe, train, trainer
from solo_vlm.train.activation_checkpointing import prepare_layers
from solo_vlm.train.checkpoint import export_checkpoint
from solo_vlm.train.experts import ExpertRouting, prepare_biases
from solo_vlm.train.model import add_adapters, load_base_model, make_model
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.parallel.context import DistributedContext, ParallelDims, init_distributed
from solo_vlm.train.recipe import LoraSettings
from solo_vlm.train.trainer import forward_backward, optimizer_step
from solo_vlm.utils.errors import SoloError

CONTEXT = DistributedContext(0, ParallelDims(1, 1, 1), torch.device("cpu"))


def families_with_aux_loss():
    """Return the families whose loss in transformers contains an auxiliary loss, by its source."""
    for family in text_families():
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[family], None)
        if kind and family != "doge" and "load_balancing_loss_func(" in inspect.getsource(kind):
            yield family


@pytest.mark.parametrize("family", [*families_with_aux_loss()])
def test_loss_and_gradient_match_transformers(family):
    model = tiny_llm(family).train()
    ids = torch.randint(2, 300, (1, 24))
    parameters = dict(model.named_parameters())

    def gradients(loss):
        loss.backward()
        found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        model.zero_grad()
        return found

    torch.manual_seed(0)
    reference = model(ids, labels=ids, use_cache=False, output_router_logits=True)
    expected = gradients(reference.loss)
    experts = ExpertRouting.of(model)
    assert experts.coefficient > 0
    experts.start_step([24], 24)
    torch.manual_seed(0)
    with experts.recording() as routed:
        plain = model(ids, labels=ids, use_cache=False, output_router_logits=False).loss
    loss = plain + experts.add_row(0, routed)
    assert loss.item() > plain.item()
    torch.testing.assert_close(loss, reference.loss)
    torch.testing.assert_close(gradients(loss), expected)
    assert experts.metrics(CONTEXT)["moe/aux_loss"] == pytest.approx(reference.aux_loss.item(), rel=1e-5)


DOCUMENTS = [np.arange(3, 3 + n) * 7 % 280 + 3 for n in (20, 9, 13)]


def row(documents, length):
    """Return a packed row of text documents."""
    empty = np.empty((0, 3072), np.uint8), np.empty((0, 3), np.int64)
    encoded = [Document(ids, np.r_[-100, ids[1:]], *empty) for ids in documents]
    return collate(encoded, length, pad_token_id=0)


def one_step(model, rows, tokens, coefficient="auto"):
    """Run forward and backward passes; return the routing and the gradients."""
    experts = ExpertRouting.of(model, coefficient)
    experts.start_step(tokens, sum(tokens))
    model.zero_grad()
    supervised = sum(int((batch["labels"] != -100).sum()) for batch in rows)
    forward_backward(model, rows, supervised, nullcontext(), experts)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return experts, gradients


@pytest.fixture
def moe():
    """Return a plain LLM with experts that attends within documents."""
    model = make_llm("qwen3_moe")[0].train()
    isolate_documents(model)
    return model


def test_padding_is_left_out(moe):
    exact, expected = one_step(moe, [row(DOCUMENTS, 42)], [42], 1.0)
    padded, gradients = one_step(moe, [row(DOCUMENTS, 64)], [42], 1.0)
    torch.testing.assert_close(gradients, expected)
    assert padded.metrics(CONTEXT) == pytest.approx(exact.metrics(CONTEXT))


def test_strength_does_not_depend_on_the_number_of_rows(moe):
    """Twice the same row, or a row of padding besides, is the same step."""
    one, expected = one_step(moe, [row(DOCUMENTS, 42)], [42], 1.0)
    for rows, tokens in (([row(DOCUMENTS, 42)] * 2, [42, 42]), ([row(DOCUMENTS, 42), row([], 42)], [42, 0])):
        several, gradients = one_step(moe, rows, tokens, 1.0)
        torch.testing.assert_close(gradients, expected)
        for name in ("moe/aux_loss", "moe/max_load", "moe/unused_experts"):
            assert several.metrics(CONTEXT)[name] == pytest.approx(one.metrics(CONTEXT)[name])


@pytest.mark.parametrize("make", [make_llm, make_solo])
def test_loss_of_transformers_is_not_added(make):
    """A configuration that asks for router logits changes neither the loss nor its gradients."""
    losses = []
    for is_asked in (False, True):
        model = make("qwen3_moe")
        model = (model[0] if isinstance(model, tuple) else model.model).train()
        model.config.get_text_config().output_router_logits = is_asked
        isolate_documents(model)
        losses.append(forward_backward(model, [row(DOCUMENTS, 64)], 10, nullcontext()))
    assert losses[0] == losses[1]


def test_load_matches_counts_by_hand(moe):
    chosen = []
    for layer in moe.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
    experts, _ = one_step(moe, [row(DOCUMENTS, 64)], [42])
    counts = torch.stack([torch.bincount(index[:42].flatten(), minlength=4) for index in chosen])
    assert (counts.sum(1) == 42 * 2).all()
    metrics = experts.metrics(CONTEXT)
    assert metrics["moe/max_load"] == pytest.approx(counts.max().item() / (42 * 2 / 4))
    assert metrics["moe/unused_experts"] == (counts == 0).sum()


def families_with_experts():
    return [family for family in text_families() if ExpertRouting.of(tiny_llm(family), 0)]


def counts_of_inputs(model):
    """Return the lists that fill with the tokens of each expert, by what its module computes with."""
    counts = []

    def count(module, inputs):
        if "Parallel" in type(module).__name__:  # JetMoe sorts tokens by expert
            counts.append(torch.tensor(inputs[1]))
        elif len(inputs) == 1:  # Llama 4 scales by zero what is not for an expert
            counts.append(inputs[0].unflatten(0, (4, -1)).any(-1).sum(-1))
        else:
            _, chosen, weights = inputs
            counts.append(torch.bincount(chosen[weights != 0], minlength=4)[:4])

    for name, module in model.named_modules():
        block, _, own = name.rpartition(".")
        gate = getattr(model.get_submodule(block), "gate", None)
        # JetMoe's experts of attention are two modules; DeepSeek-V4 first chooses experts by token ID.
        is_moe = (
            own == "experts" and not hasattr(module, "input_linear") and "Hash" not in type(gate).__name__
        )
        if is_moe or (own == "input_linear" and "Parallel" in type(module).__name__):
            module.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("family", families_with_experts())
def test_load_matches_the_inputs_of_the_experts(family):
    model = tiny_llm(family)
    counts = counts_of_inputs(model)
    experts = ExpertRouting.of(model, 0)
    experts.start_step([24], 24)
    with experts.recording() as routed, torch.no_grad():
        model(torch.randint(2, 300, (1, 24)), use_cache=False)
    experts.add_row(0, routed)
    metrics = experts.metrics(CONTEXT)
    assert metrics["moe/max_load"] == pytest.approx(max(float(c.max() / c.double().mean()) for c in counts))
    assert metrics["moe/unused_experts"] == sum(int((c == 0).sum()) for c in counts)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_solo_gradients_survive_checkpointing(mode):
    def step(mode):
        model = make_solo("mixtral").model.train()
        prepare_layers(model, mode)
        isolate_documents(model)
        experts, gradients = one_step(model, [row(DOCUMENTS, 48)] * 2, [42, 42], 1.0)
        return gradients, experts.metrics(CONTEXT)

    (expected, metrics), (gradients, same) = step("none"), step(mode)
    torch.testing.assert_close(gradients, expected)
    assert same == pytest.approx(metrics)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "llama4_text"])
def test_routers_that_do_not_return_their_choice_survive_checkpointing(family, mode):
    def step(mode):
        model = tiny_llm(family).train()
        prepare_layers(model, mode)
        isolate_documents(model)
        return one_step(model, [row(DOCUMENTS, 48)], [42])[1]

    torch.testing.assert_close(step(mode), step("none"))


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_layers_compile_to_one_graph(mode, monkeypatch):
    """Recording neither breaks the graph of a layer nor makes one per layer."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ids = torch.arange(3, 35)[None]

    def step(prepare):
        model = make_llm("mixtral")[0].train()
        prepare(model)
        experts = ExpertRouting.of(model, 1.0)
        experts.start_step([32], 32)
        with experts.recording() as routed:
            loss = model(ids, labels=ids, use_cache=False).loss
        (loss + experts.add_row(0, routed)).backward()
        return [p.grad for p in model.parameters()], experts.metrics(CONTEXT)

    def prepare(model):
        prepare_layers(model, mode, is_compiled=True)

    torch._dynamo.reset()
    counters.clear()
    (expected, metrics), (gradients, same) = step(lambda model: None), step(prepare)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
    assert same == pytest.approx(metrics, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_frozen_routers_get_no_auxiliary_loss_unless_configured():
    model = make_llm("qwen3_moe")[0]
    add_adapters(model, LoraSettings(), new_tokens=False)
    assert ExpertRouting.of(model).coefficient == 0
    assert ExpertRouting.of(model, 0.01).coefficient == 0.01


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4_text", "llama"])
def test_families_without_auxiliary_loss_say_so_and_reject_a_coefficient(family, caplog):
    model = tiny_llm(family)
    with pytest.raises(
        SoloError, match=f"no auxiliary loss for the routers of {family} models; set it to auto or 0"
    ):
        ExpertRouting.of(model, 0.01)
    experts = ExpertRouting.of(model)
    assert experts is None if family == "llama" else experts.coefficient == 0
    assert (f"transformers has none for {family}" in caplog.text) == (family != "llama")


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama4_text"])
def test_load_is_measured_without_auxiliary_loss(family):
    """With a router of zeros, ties go to the first experts."""
    model = tiny_llm(family).train()
    experts = ExpertRouting.of(model, 0)
    experts.start_step([24], 24)
    with experts.recording() as routed, torch.no_grad():
        model(torch.randint(2, 300, (1, 24)), use_cache=False)
    assert experts.add_row(0, routed) == 0
    metrics = experts.metrics(CONTEXT)
    assert 1 <= metrics["moe/max_load"] <= 4
    assert ("moe/aux_loss" in metrics) == (family == "gpt_oss")


def test_own_kind_of_auxiliary_loss_is_rejected():
    model = tiny_llm("doge", is_moe=True)
    with pytest.raises(SoloError, match="the auxiliary loss of doge models is not supported; set it to 0"):
        ExpertRouting.of(model)


# ---------------------------------------------------------------------------------- biases of routers

RATE = 0.01
OTHER_RULES = {"longcat_flash", "zaya"}  # a share of their tokens skips the experts


def families_that_may_have_biases():
    """Return the families with experts whose source has buffers or frozen parameters in zeros."""
    for family in text_families():
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[family], None)
        source = inspect.getsource(sys.modules[kind.__module__]) if kind else ""
        if "router_logits" in source and re.search(r"nn\.Buffer\(torch\.zeros|requires_grad=False", source):
            yield family


@pytest.mark.parametrize("family", [*families_that_may_have_biases()])
def test_all_untrained_weights_beside_routers_are_found_and_decide(family):
    model = tiny_llm(family)
    layers = model.get_decoder().layers
    found = {
        name
        for name, tensor in [*layers.named_parameters(), *layers.named_buffers()]
        if re.search("(mlp|feed_forward|mixer)[.]", name)
        and tensor.is_floating_point()
        and not tensor.requires_grad
    }
    if family in OTHER_RULES:
        assert found
        with pytest.raises(SoloError, match=f"this {family} model have no biases that balance"):
            prepare_biases(model, is_updated=True)
        return
    prepare_biases(model, is_updated=bool(found))
    biases = {name.partition("layers.")[2]: model.get_buffer(name) for name in model.trained_buffers}
    assert biases.keys() == found
    for bias in biases.values():
        bias.view(-1)[1] = 100
    if found:
        experts = ExpertRouting.of(model, 0)
        with experts.recording() as routed, torch.no_grad():
            model(torch.randint(2, 300, (1, 24)), use_cache=False)
        assert len(routed) == len(found)
        assert all((chosen == 1).any(dim=1).all() for _, chosen in routed)


@pytest.mark.parametrize("kind", ["llm", "solo"])
@pytest.mark.parametrize("family", [*families_that_may_have_biases()])
def test_loading_in_bfloat16_keeps_biases(family, kind, tmp_path):
    """The saved float32 biases choose among experts; some families would round them."""
    model = tiny_llm(family)
    load = load_llm
    if kind == "solo":
        model, load = tiny_solo(SoloConfig(text_config=model.config)), load_model
    biases = router_biases(model.state_dict())
    for bias in biases.values():  # Zaya's last one is fixed
        bias.view(-1)[:-1] = torch.linspace(-0.0113, 0.0137, bias.numel() - 1)
    model.load_state_dict(biases, strict=False)
    model.save_pretrained(tmp_path / "float32")
    loaded = load(tmp_path / "float32", dtype="bfloat16")
    assert type(loaded) is type(model)
    torch.testing.assert_close(router_biases(loaded.state_dict()), biases, rtol=0, atol=0)
    if family == "deepseek_v4" and kind == "solo":  # needs token IDs beside embeddings
        return
    loaded.save_pretrained(tmp_path / "bfloat16")
    ids = torch.randint(2, 300, (1, 24))
    chosen = []
    for each in (loaded, load(tmp_path / "bfloat16")):
        with ExpertRouting.of(each, 0).recording() as routed, torch.no_grad():
            each(ids, use_cache=False)
        chosen.append([choice for _, choice in routed])
    torch.testing.assert_close(*chosen)


def router_biases(tensors):
    """Return the biases of routers among tensors by name."""
    return {name: tensor.clone() for name, tensor in tensors.items() if name.endswith(ROUTER_BIASES)}


def updated_by_hand(model, rows, tokens):
    """Return the biases after a step, by counting one by one which experts each token is sent to."""
    counts, handles = {}, []

    def count(module, inputs):
        (chosen,) = (states for states in inputs if not states.is_floating_point())
        for expert in chosen[:length].flatten().tolist():
            counts[module][expert] += 1

    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:
            counts[experts] = [0] * 4
            handles.append(experts.register_forward_pre_hook(count))
    for batch, length in zip(rows, tokens, strict=True):  # noqa: B007, see count
        with torch.no_grad():
            model(**model_inputs(model, batch), use_cache=False)
    for handle in handles:
        handle.remove()
    biases = router_biases(model.state_dict())
    for bias, loads in zip(biases.values(), counts.values(), strict=True):
        assert sum(loads) == 2 * sum(tokens)
        signs = [(load < sum(loads) / 4) - (load > sum(loads) / 4) for load in loads]
        bias += torch.tensor([RATE * (sign - sum(signs) / 4) for sign in signs]).view_as(bias)
    return biases


def step_recipe(**changes):
    return Recipe.parse(run_settings(".", "out", router_bias_update=RATE, **changes))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2"])
def test_biases_follow_counts_by_hand(family, mode):
    """Padding, a row of padding, and recomputation count nothing; micro-batches count together."""
    model = make_llm(family)[0].train()
    prepare_biases(model, is_updated=True)
    prepare_layers(model, mode)
    isolate_documents(model)
    recipe = step_recipe()
    optimizer = make_optimizer(model, recipe.optimizer)
    experts = ExpertRouting.of(model, bias_update=RATE)
    documents = [DOCUMENTS, DOCUMENTS[:2], [], [DOCUMENTS[2][::-1].copy()]]
    rows, tokens = [row(each, 64) for each in documents], [sum(map(len, each)) for each in documents]
    supervised = sum(int((batch["labels"] != -100).sum()) for batch in rows)
    for _ in range(5):
        expected = updated_by_hand(model, rows, tokens)
        experts.start_step(tokens, sum(tokens))
        optimizer_step(model, optimizer, rows, supervised, recipe, CONTEXT, experts)
        torch.testing.assert_close(router_biases(model.state_dict()), expected)
        ranges = [float(bias.max() - bias.min()) for bias in expected.values()]
        assert experts.metrics(CONTEXT)["moe/bias_range"] == pytest.approx(max(ranges))
    assert all(bias.dtype == torch.float32 and bias.any() for bias in expected.values())


def test_biases_balance_the_load():
    model = make_llm("deepseek_v3")[0].train()
    prepare_biases(model, is_updated=True)
    experts = ExpertRouting.of(model, bias_update=RATE)
    loads = []
    for _ in range(60):
        experts.start_step([42], 42)
        with experts.recording() as routed, torch.no_grad():
            model(torch.from_numpy(np.concatenate(DOCUMENTS))[None], use_cache=False)
        experts.add_row(0, routed)
        experts.update_biases(CONTEXT)
        loads.append(experts.metrics(CONTEXT)["moe/max_load"])
    assert loads[-1] < 1.2 < loads[0]


def test_skipped_step_leaves_biases():
    model = make_llm("deepseek_v3")[0].train()
    prepare_biases(model, is_updated=True)
    isolate_documents(model)
    recipe = step_recipe()
    experts = ExpertRouting.of(model, bias_update=RATE)
    experts.start_step([42], 42)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    optimizer = make_optimizer(model, recipe.optimizer)
    result = optimizer_step(model, optimizer, [row(DOCUMENTS, 64)], 39, recipe, CONTEXT, experts)
    assert not result.is_finite
    assert not any(bias.any() for bias in router_biases(model.state_dict()).values())


def test_updated_biases_reach_compiled_layers(monkeypatch):
    """An update compiles nothing again."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ids = torch.arange(3, 35)[None]

    def run(is_compiled):
        model = make_llm("minimax_m2")[0].train()
        prepare_biases(model, is_updated=True)
        prepare_layers(model, "full", is_compiled=is_compiled)
        experts = ExpertRouting.of(model, bias_update=0.1)
        losses = []
        for _ in range(4):
            experts.start_step([32], 32)
            with experts.recording() as routed:
                loss = model(ids, labels=ids, use_cache=False).loss
            (loss + experts.add_row(0, routed)).backward()
            experts.update_biases(CONTEXT)
            losses.append(loss.item())
        return losses, router_biases(model.state_dict())

    torch._dynamo.reset()
    counters.clear()
    (expected, biases), (losses, same) = run(False), run(True)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) > 1
    torch.testing.assert_close(same, biases, rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("family", "changes"), [("qwen3_moe", {}), ("llama", {}), ("lfm2_moe", {"use_expert_bias": False})]
)
def test_bias_update_without_biases_is_rejected(family, changes):
    with pytest.raises(SoloError, match=f"routers of this {family} model have no biases .* set it to 0"):
        prepare_biases(tiny_llm(family, **changes), is_updated=True)


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [({"lora": {"rank": 2}}, "lora"), ({"trainable": "patch_embedding"}, "trainable = patch_embedding")],
)
def test_bias_update_of_frozen_routers_is_rejected(changes, frozen):
    with pytest.raises(
        SoloError, match=f"^settings: router_bias_update = 0.01: routers are not trained with {frozen}"
    ):
        step_recipe(**changes)


# ------------------------------------------------------------------------------- biases in whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data and models whose biases bfloat16 would round."""
    folder = tmp_path_factory.mktemp("biases")
    write_training_data(folder, image_rows(24), text_rows(64))
    for family in ("deepseek_v3", "ernie4_5_moe"):
        solo = make_solo(family)
        for name, bias in solo.model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.linspace(-0.011, 0.013, bias.numel()).view_as(bias))
        solo.save(folder / family)
    return folder


def settings(folder, out, **changes):
    changes = {"model": "deepseek_v3", "steps": 6, "router_bias_update": RATE, **changes}
    return run_settings(folder, out, **changes)


def saved_biases(model):
    return router_biases(load_file(model / "model.safetensors"))


def run_and_write_biases(plain, path):
    """Train, and write the biases that this process ends with."""
    export_model = trainer.export_model

    def export(out, model, *arguments):
        save_file(router_biases(model.state_dict()), f"{path}-{arguments[-1].rank}")
        return export_model(out, model, *arguments)

    trainer.export_model = export
    run_recipe(plain)


@pytest.fixture(scope="module")
def alone(folder):
    """Return the output of a run in one process, and its biases after each step."""
    steps = []
    with pytest.MonkeyPatch.context() as patch:

        def step(model, *arguments):
            result = optimizer_step(model, *arguments)
            steps.append(router_biases(model.state_dict()))
            return result

        patch.setattr(trainer, "optimizer_step", step)
        train(Recipe.parse(settings(folder, folder / "alone")))
    return folder / "alone", steps


def test_exported_models_have_the_biases_of_their_step(folder, alone, tmp_path):
    """Those of the run's end, and of a checkpoint in between."""
    out, steps = alone
    start, end = saved_biases(folder / "deepseek_v3"), saved_biases(out / "model")
    assert end.keys() == start.keys() and len(end) == 3
    export_checkpoint(out, tmp_path / "fourth", step=4)
    for saved, biases in ((end, steps[5]), (saved_biases(tmp_path / "fourth"), steps[3])):
        torch.testing.assert_close(saved, biases, rtol=0, atol=0)
    for before in (start, steps[3]):
        assert any(not torch.equal(end[name], before[name]) for name in end)


def test_validation_does_not_move_biases(folder, alone, tmp_path):
    held_out = {"sources": [{"path": "images.parquet"}], "interval": 1, "sequences": 2}
    train(Recipe.parse(settings(folder, tmp_path / "out", validation=held_out)))
    torch.testing.assert_close(
        saved_biases(tmp_path / "out" / "model"), saved_biases(alone[0] / "model"), rtol=0, atol=0
    )


def test_biases_stay_by_default(folder, tmp_path):
    train(Recipe.parse(settings(folder, tmp_path / "out", steps=2, router_bias_update=0)))
    torch.testing.assert_close(
        saved_biases(tmp_path / "out" / "model"), saved_biases(folder / "deepseek_v3"), rtol=0, atol=0
    )
    assert "moe/bias_range" not in read_steps(tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, {}),
        (2, {"replicate": 2, "defer_reduction": True}),
        (2, {"tensor": 2}),
        (2, {"context": 2}),
        (4, {"tensor": 2, "context": 2}),
    ],
    ids=str,
)
@pytest.mark.distributed
def test_every_process_has_the_biases_of_a_single_process(folder, alone, tmp_path, start, size, parallel):
    plain = settings(folder, tmp_path / "out", parallel=parallel, activation_checkpointing="full")
    assert start(size, run_and_write_biases, plain, tmp_path / "rank").wait() == [0] * size
    for biases in [load_file(f"{tmp_path}/rank-{rank}") for rank in range(size)]:
        torch.testing.assert_close(biases, saved_biases(tmp_path / "out" / "model"), rtol=0, atol=0)
        torch.testing.assert_close(biases, alone[1][-1], rtol=0, atol=0)
    ours, theirs = read_steps(tmp_path / "out"), read_steps(alone[0])
    for name in ("moe/max_load", "moe/unused_experts", "moe/bias_range"):
        assert [line[name] for line in ours] == [line[name] for line in theirs], name


def run_four_steps(plain):
    """Train until the fifth step, in which the process ends."""
    calls, step = [], trainer.optimizer_step

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    trainer.optimizer_step = counted
    run_recipe(plain)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
@pytest.mark.distributed
def test_biases_resume_on_any_number_of_processes(folder, alone, tmp_path, start, sizes):
    """A checkpoint has them; the run in between has ended by SIGKILL."""
    before, after = sizes
    plain = settings(folder, tmp_path / "out", checkpoint={"save_interval": 4, "asynchronous": False})
    assert 0 not in start(before, run_four_steps, plain).wait()
    assert start(after, run_recipe, plain).wait() == [0] * after
    torch.testing.assert_close(saved_biases(tmp_path / "out" / "model"), alone[1][-1], rtol=0, atol=0)
    ours, theirs = (read_steps(path) for path in (tmp_path / "out", alone[0]))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)


def write_biases_in_use(plain, path):
    """Write what a sharded model in bfloat16 adds to the scores of its experts."""
    recipe = Recipe.parse(plain)
    with init_distributed(recipe) as context:
        model, _ = make_model(recipe, context)
        added = {}

        def record(name, module, inputs, output):
            added[name] = output - inputs[0]

        for name, module in model.named_modules():
            if name.endswith("moe_statics"):
                module.register_forward_hook(partial(record, name))
        batch = model_inputs(model, row(DOCUMENTS, 64))
        model(**batch, use_cache=False)
        save_file({name: bias[0] for name, bias in added.items()}, f"{path}-{context.rank}")


@pytest.mark.distributed
def test_biases_that_are_parameters_are_not_rounded_by_sharding(folder, tmp_path, start):
    plain = settings(folder, tmp_path / "out", model="ernie4_5_moe", precision="bf16", router_bias_update=0)
    assert start(2, write_biases_in_use, plain, tmp_path / "used").wait() == [0, 0]
    used = load_file(tmp_path / "used-0")
    biases = router_biases(load_base_model(folder / "ernie4_5_moe")[0].state_dict())
    assert len(used) == len(biases) == 3
    for name, bias in biases.items():
        torch.testing.assert_close(used[name.rpartition(".")[0]], bias[0], rtol=0, atol=1e-7)
