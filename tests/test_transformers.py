"""attn_implementation="fastseq" in models of Hugging Face transformers, beside "eager".

The models are small, have random parameters and are built from configurations; nothing is downloaded. They
are in float32, because eager computes the softmax of most models in that, and hides keys of float64 models so
that it has NaN there. Rows of padding are not compared: in them eager has the mean of what is hidden.
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastseq
from fastseq.integrations import transformers as integration
from fastseq.integrations.transformers_masks import Mask, mask
from tolerances import SAME_FLOAT32, SAME_FLOAT64, assert_as_accurate_as_torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "eos_token_id": None}
WINDOWED = {**GROUPED, "sliding_window": 3}


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()
    integration.register()  # again does no harm


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)


def causal_lm(name, sizes, **more):
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    return transformers.T5Model(transformers.T5Config(**sizes, dropout_rate=0.0))


def bart():
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in {"layers": 2}.items()}
    sizes = {"d_model": 16, "vocab_size": 50, "max_position_embeddings": 64, **layers}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
    return transformers.BartModel(transformers.BartConfig(**sizes))


DECODERS = {
    "Llama": lambda: causal_lm("Llama", GROUPED),
    "Mistral": lambda: causal_lm("Mistral", WINDOWED),
    "Gemma2": lambda: causal_lm("Gemma2", WINDOWED, query_pre_attn_scalar=4, attn_logit_softcapping=0.5),
    "GptOss": lambda: causal_lm("GptOss", WINDOWED, num_local_experts=2, num_experts_per_tok=1),
}
MODELS = {"Bert": bert, **DECODERS}
PADDING = {
    "none": None,
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]],
    "gap": [[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1]],
}
TOKENS = torch.tensor([[7, 3, 9, 4, 1, 8, 2], [5, 6, 7, 8, 9, 10, 11]])


def pair(make):
    """The same model twice, with fastseq and with eager."""
    torch.manual_seed(0)
    ours = make().eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("sinks") or "relative_attention_bias" in name:
            nn.init.normal_(parameter)
    theirs = copy.deepcopy(ours)
    ours.set_attn_implementation("fastseq")
    theirs.set_attn_implementation("eager")
    return ours, theirs


def outputs(model, *args, **keywords):
    result = model(*args, **keywords)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def calls(function):
    return [call for call in fastseq.explain(function) if call.mode == "ATTENTION"]


def assert_same_with_gradients(ours, theirs, run, seen):
    results = [run(model) for model in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a[seen], b[seen], **SAME_FLOAT32)
    losses = [sum(y[seen].sin().sum() for y in result) for result in results]
    both = [gradients(model, loss) for model, loss in zip((ours, theirs), losses, strict=True)]
    assert any(g.any() for g in both[0])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT32)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_eagers(name, padding):
    ours, theirs = pair(MODELS[name])
    given = None if PADDING[padding] is None else torch.tensor(PADDING[padding])
    seen = torch.ones_like(TOKENS, dtype=torch.bool) if given is None else given.bool()

    def run(model):
        return [outputs(model, TOKENS, attention_mask=given)]

    assert_same_with_gradients(ours, theirs, run, seen)
    made = calls(lambda: run(ours))
    assert len(made) == 2, "each layer once"
    dense = f"attn_mask bool (2, 1, {TOKENS.shape[1]}, {TOKENS.shape[1]})"
    assert not any(dense in call.title for call in made), "no mask of all queries and keys"
    assert not calls(lambda: run(theirs))


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_bfloat16_is_as_accurate_as_eager(name):
    ours, theirs = pair(MODELS[name])
    exact = outputs(copy.deepcopy(theirs).double(), TOKENS)
    a, b = (outputs(model.bfloat16(), TOKENS) for model in (ours, theirs))
    assert_as_accurate_as_torch(a, b, exact, torch.bfloat16)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("make", [t5, bart], ids=["T5", "Bart"])
def test_encoder_decoder_is_eagers(make, padding):
    """Of T5 the position bias too, whose gradient is that of the embedding it comes from."""
    ours, theirs = pair(make)
    given = None if PADDING[padding] is None else torch.tensor(PADDING[padding])
    target = TOKENS.flip(1)[:, :4]

    def run(model):
        return [outputs(model, input_ids=TOKENS, attention_mask=given, decoder_input_ids=target)]

    assert_same_with_gradients(ours, theirs, run, slice(None))
    assert len(calls(lambda: run(ours))) == 6


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_with_a_cache_is_eagers(name, padding):
    ours, theirs = pair(DECODERS[name])
    given = torch.ones_like(TOKENS) if PADDING[padding] is None else torch.tensor(PADDING[padding])
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    results = [model.generate(TOKENS, attention_mask=given, **settings) for model in (ours, theirs)]
    assert torch.equal(*(result.sequences for result in results))
    for a, b in zip(*(result.logits for result in results), strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT32)


def test_generation_with_a_static_cache_is_eagers():
    ours, theirs = pair(DECODERS["Llama"])
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    settings["disable_compile"] = True
    assert torch.equal(*(model.generate(TOKENS, **settings) for model in (ours, theirs)))


@pytest.mark.parametrize("make", [t5, bart], ids=["T5", "Bart"])
def test_generation_of_encoder_decoders_is_eagers(make):
    name = "T5" if make is t5 else "Bart"
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    ours, theirs = pair(lambda: cls(make().config))
    given = torch.tensor(PADDING["right"])
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "min_new_tokens": 5}
    settings |= {"decoder_start_token_id": 0, "forced_bos_token_id": None, "forced_eos_token_id": None}
    assert torch.equal(
        *(model.generate(TOKENS, attention_mask=given, **settings) for model in (ours, theirs))
    )


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_packed_position_ids_are_eagers(name):
    """Several sequences in one row, told apart by their positions."""
    ours, theirs = pair(DECODERS[name])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0]])

    def run(model):
        return [outputs(model, TOKENS, position_ids=positions, use_cache=False)]

    assert_same_with_gradients(ours, theirs, run, slice(None))
    if name != "GptOss":  # whose model does not ask for such masks
        assert all("packed" in call.title for call in calls(lambda: run(ours))), "no mask is made of them"


def test_users_own_masks_are_eagers():
    ours, theirs = pair(DECODERS["Llama"])
    visible = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    visible[1, 0, 5, 2] = False
    added = torch.where(visible, torch.linspace(-1, 1, 49).view(7, 7), -torch.inf)

    def run(model):
        return [outputs(model, TOKENS, attention_mask=added)]

    assert_same_with_gradients(ours, theirs, run, slice(None))


def test_attention_weights_are_eagers():
    ours, theirs = pair(bert)
    layer = [model.encoder.layer[0].attention.self for model in (ours, theirs)]
    x = torch.randn(2, 5, 16)
    results = [module(x, output_attentions=True) for module in layer]
    for a, b in zip(*(result[:2] for result in results), strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT32)


def test_dropout_is_applied_in_training():
    ours, _ = pair(lambda: causal_lm("Llama", GROUPED, attention_dropout=0.5))
    assert torch.equal(outputs(ours, TOKENS), outputs(ours, TOKENS))
    ours.train()
    assert not torch.equal(outputs(ours, TOKENS), outputs(ours, TOKENS))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_the_same(use_reentrant):
    ours, _ = pair(DECODERS["Mistral"])
    ours.train()
    given = torch.tensor(PADDING["left"])

    def run():
        return gradients_of(outputs(ours, TOKENS, attention_mask=given, use_cache=False))

    def gradients_of(output):
        ours.zero_grad()
        output[given.bool()].sin().sum().backward()
        return [p.grad for p in ours.parameters()]

    expected = run()
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.enable_input_require_grads()
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT32)


def test_torch_compile_is_the_same():
    ours, theirs = pair(DECODERS["Mistral"])
    given = torch.tensor(PADDING["left"])
    compiled = torch.compile(ours, backend="aot_eager")
    with torch.no_grad():
        output = outputs(compiled, TOKENS, attention_mask=given, use_cache=False)
        expected = outputs(theirs, TOKENS, attention_mask=given, use_cache=False)
    torch.testing.assert_close(output[given.bool()], expected[given.bool()], **SAME_FLOAT32)


def test_compiled_layers_of_a_model_are_the_same():
    """The mask is made outside of what is compiled."""
    ours, theirs = pair(DECODERS["Mistral"])
    given = torch.tensor(PADDING["left"])
    for layer in ours.model.layers:
        layer.compile(backend="aot_eager")
    with torch.no_grad():
        output = outputs(ours, TOKENS, attention_mask=given, use_cache=False)
        expected = outputs(theirs, TOKENS, attention_mask=given, use_cache=False)
    torch.testing.assert_close(output[given.bool()], expected[given.bool()], **SAME_FLOAT32)


# ------------------------------------------------------------------------------------------------------ masks


def functions():
    from transformers import masking_utils as m

    yield "causal", m.causal_mask_function
    yield "bidirectional", m.bidirectional_mask_function
    for window in (1, 2, 4, 100):
        yield f"window {window}", m.sliding_window_causal_mask_function(window)
        yield f"both sides {window}", m.sliding_window_bidirectional_mask_function(window)
    yield "chunks", m.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64))
    yield "mine", m.and_masks(m.causal_mask_function, lambda b, h, q, kv: (q - kv) % 2 == 0)


@pytest.mark.parametrize("padding", ["none", "all", "right", "left", "gap", "nothing", "shorter"])
@pytest.mark.parametrize("name", [name for name, _ in functions()])
def test_structure_is_what_the_dense_mask_says(name, padding):
    """For every offset of queries and keys that a cache may have, by the outputs of both."""
    from transformers.masking_utils import sdpa_mask

    structured = 0
    for queries, keys, q_offset, kv_offset in (
        (5, 5, 0, 0),
        (1, 6, 5, 0),
        (3, 7, 4, 0),
        (3, 8, 2, 0),
        (4, 6, 0, 0),
        (1, 9, 3, 0),
        (2, 4, 7, 5),
        (3, 4, 5, 5),
        (6, 4, 0, 0),
    ):
        positions = kv_offset + keys
        given = {
            "none": None,
            "all": torch.ones(2, positions, dtype=torch.bool),
            "right": torch.arange(positions) < torch.tensor([[positions], [kv_offset + 2]]),
            "left": torch.arange(positions) >= torch.tensor([[0], [kv_offset + 1]]),
            "gap": torch.arange(positions) != torch.tensor([[kv_offset + 1], [kv_offset]]),
            "nothing": torch.zeros(2, positions, dtype=torch.bool),
            "shorter": torch.ones(2, positions - 1, dtype=torch.bool),
        }[padding]
        sizes = (2, queries, keys, q_offset, kv_offset, dict(functions())[name], given)
        dense = sdpa_mask(*sizes, allow_is_causal_skip=False)
        ours = mask(*sizes, allow_is_causal_skip=False)
        q, k, v = (torch.randn(2, 2, n, 4).double() for n in (queries, keys, keys))
        expected, _ = integration.attention(nn.Module(), q, k, v, dense)
        output, _ = integration.attention(nn.Module(), q, k, v, ours)
        torch.testing.assert_close(output, expected, **SAME_FLOAT64)
        structured += isinstance(ours, Mask)
        assert torch.equal(ours & True, dense), "to everybody else it is the dense mask"
    assert bool(structured) == (name not in ("chunks", "mine"))


@pytest.mark.parametrize("name", [name for name, _ in functions()])
def test_packed_structure_is_what_the_dense_mask_says(name):
    from transformers import masking_utils as m

    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [2, 3, 4, 5, 6, 0, 1, 2]])
    function = m.packed_sequence_compatibility_function(
        dict(functions())[name], positions, m.find_packed_sequence_indices(positions)
    )
    sizes = (2, 8, 8, 0, 0, function)
    dense = m.sdpa_mask(*sizes, allow_is_causal_skip=False)
    ours = mask(*sizes, allow_is_causal_skip=False)
    q, k, v = (torch.randn(2, 2, 8, 4).double() for _ in range(3))
    for options in ({}, {"output_attentions": True}, {"position_bias": torch.randn(1, 2, 8, 8).double()}):
        results = [integration.attention(nn.Module(), q, k, v, x, **options)[0] for x in (ours, dense)]
        torch.testing.assert_close(*results, **SAME_FLOAT64)
    assert isinstance(ours, Mask) == (name not in ("chunks", "mine"))


def test_masks_that_follow_from_the_layer_are_none():
    ones = torch.ones(2, 5, dtype=torch.bool)
    from transformers.masking_utils import bidirectional_mask_function as bidirectional

    assert mask(2, 5, 5) is None
    assert mask(2, 5, 5, attention_mask=ones) is None
    assert mask(2, 1, 5, 4) is None
    skip = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert mask(2, 5, 5, mask_function=bidirectional, attention_mask=ones, **skip) is None
    assert mask(2, 3, 5, 2) is not None, "the layer would put the first query beside the first key"
    assert mask(2, 5, 5, allow_is_causal_skip=False) is not None


def test_changed_masks_say_what_they_say_now():
    q, k, v = (torch.randn(2, 2, 5, 4).double() for _ in range(3))
    ours = mask(2, 5, 5, attention_mask=torch.tensor(PADDING["left"])[:, :5].bool())
    before, _ = integration.attention(nn.Module(), q, k, v, ours)
    cut = ours[..., :4]
    assert type(cut) is torch.Tensor
    a, _ = integration.attention(nn.Module(), q, k[:, :, :4], v[:, :, :4], cut)
    assert not torch.allclose(a, before)
    ours.logical_and_(torch.eye(5, dtype=torch.bool))
    after, _ = integration.attention(nn.Module(), q, k, v, ours)
    torch.testing.assert_close(after[0], v[0].transpose(0, 1), **SAME_FLOAT64)


def test_masks_are_made_in_full_only_if_somebody_looks(monkeypatch):
    from transformers import masking_utils

    ours = mask(2, 5, 5, attention_mask=torch.tensor(PADDING["left"])[:, :5].bool())
    monkeypatch.setattr(masking_utils, "sdpa_mask", None)
    q = torch.randn(2, 2, 5, 4)
    integration.attention(nn.Module(), q, q, q, ours)
    assert ours.shape == (2, 1, 5, 5)
    assert ours.dtype == torch.bool
    assert ours._dense is None
    assert ours.any()
    assert ours._dense is not None


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["head_mask", "indices", "block_indices", "sinks", "cache"])
def test_what_is_not_computed_is_refused(name):
    q = torch.randn(2, 2, 5, 4)
    with pytest.raises(NotImplementedError, match=f"given: {name} for attn_implementation") as error:
        integration.attention(nn.Module(), q, q, q, None, **{name: q})
    assert len(str(error.value).splitlines()) == 3


def test_without_transformers_the_error_is_clear_and_fastseq_imports_none():
    code = (
        "import sys, fastseq\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "from fastseq.integrations import transformers\n"
        "try:\n"
        "    transformers.register()\n"
        "except ImportError as error:\n"
        "    assert str(error).startswith('given: no transformers'), error\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_older_versions_are_refused(monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ImportError, match="accepted: transformers from 5 on"):
        integration.register()
