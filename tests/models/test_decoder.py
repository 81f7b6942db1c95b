import dataclasses

import pytest
import torch

from marrow.kernels import dispatch
from marrow.kernels.attention.attention import attention, pack
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder


def attend_in(document, row_tokens):
    packing = pack(document, row_tokens)
    return lambda _, q, k, v: attention(q, k, v, packing)


def test_a_packed_document_gives_what_it_gives_alone(tiny):
    decoder = Decoder(tiny, seed=3)
    tokens = torch.randint(0, 96, (20,))
    document = torch.tensor([0] * 13 + [1] * 7)
    positions = torch.cat([torch.arange(13), torch.arange(7)])
    packed = decoder(tokens, positions, attend_in(document, 20))
    for part in (slice(0, 13), slice(13, 20)):
        length = part.stop - part.start
        alone = decoder(
            tokens[part], torch.arange(length), attend_in(torch.zeros(length, dtype=torch.int32), length)
        )
        # fp32, products over other row counts: a few ulp of values around 1.
        torch.testing.assert_close(packed[part], alone, rtol=1e-4, atol=1e-5)


def test_a_token_never_changes_what_comes_before_it(tiny):
    decoder = Decoder(tiny)
    tokens = torch.randint(0, 95, (12,))
    attend = attend_in(torch.zeros(12, dtype=torch.int32), 12)
    before = decoder(tokens, torch.arange(12), attend)
    changed = tokens.clone()
    changed[7] += 1
    after = decoder(changed, torch.arange(12), attend)
    assert torch.equal(before[:7], after[:7])
    assert (before[7:] != after[7:]).any(1).all()


def test_attend_is_called_once_a_layer_with_rotated_heads(tiny):
    seen = []

    def attend(layer, q, k, v):
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return q

    Decoder(tiny)(torch.zeros(5, dtype=torch.int64), torch.arange(5), attend)
    assert seen == [(i, (5, 4, 8), (5, 2, 8), (5, 2, 8)) for i in range(tiny.num_layers)]


def test_weights_are_a_pure_function_of_the_seed(tiny):
    torch.manual_seed(1)
    first = Decoder(tiny, seed=7).state_dict()
    torch.manual_seed(2)
    again = Decoder(tiny, seed=8)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.values(), again.state_dict().values(), strict=True)
    )
    again.reset(7)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), again.state_dict().values(), strict=True))
    low = Decoder(tiny, seed=7, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(first.values(), low.values(), strict=True))


def test_making_a_decoder_leaves_the_global_generator_alone(tiny):
    state = torch.get_rng_state()
    Decoder(tiny, seed=7)
    assert torch.equal(state, torch.get_rng_state())


def test_fresh_weights_predict_nothing(tiny, logits_of):
    config = dataclasses.replace(tiny, hidden_size=128, vocab_size=512)
    logits = logits_of(Decoder(config), torch.randint(0, 512, (2, 16)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 512, (32,)))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.3)


def test_a_tied_head_is_the_embedding(tiny):
    tied, untied = Decoder(tiny), Decoder(dataclasses.replace(tiny, tie_embeddings=False))
    assert tied.output_weight is tied.embedding_VC
    assert untied.output_weight is untied.head_VC
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


def test_a_config_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="with_vocab_size"):
        Decoder(ModelConfig())


def test_bf16_weights_give_bf16_states_near_those_of_fp32(tiny):
    tokens, attend = torch.randint(0, 96, (12,)), attend_in(torch.zeros(12, dtype=torch.int32), 12)
    low = Decoder(tiny, dtype=torch.bfloat16)
    wide = Decoder(tiny)
    with torch.no_grad():
        for a, b in zip(wide.parameters(), low.parameters(), strict=True):
            a.copy_(b)
    hidden = low(tokens, torch.arange(12), attend_in(torch.zeros(12, dtype=torch.int32), 12))
    assert hidden.dtype == torch.bfloat16
    # Some ten roundings of 2^-9 on the way, of normed values up to about 3.
    torch.testing.assert_close(hidden.float(), wide(tokens, torch.arange(12), attend), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("mode", ["reference", "auto"])
def test_every_weight_learns(tiny, mode):
    dispatch.reset(mode)
    decoder = Decoder(tiny)
    hidden = decoder(
        torch.randint(0, 96, (12,)), torch.arange(12), attend_in(torch.tensor([0] * 5 + [1] * 7), 12)
    )
    decoder.logits(hidden).square().sum().backward()
    dispatch.reset()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.slow
def test_it_compiles_into_one_graph_for_all_batches(tiny):
    """Two packings of the same shape, new tensors each: the graph of the first serves the second."""
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    decoder = Decoder(tiny)
    compiled = torch.compile(decoder, fullgraph=True, backend=backend)
    tokens, positions = torch.randint(0, 96, (12,)), torch.arange(12)
    for lengths in ([5, 7], [3, 9], [1, 11]):
        document = torch.tensor([0] * lengths[0] + [1] * lengths[1])
        expected = decoder(tokens, positions, attend_in(document, 12))
        torch.testing.assert_close(compiled(tokens, positions, attend_in(document, 12)), expected)
    assert compiles == 1
