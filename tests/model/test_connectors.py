import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.towers import ConnectorConfig
from unimoe_mcore.model.connectors import Connector, build_connector, register_connector
from unimoe_mcore.model.connectors.frame_tokens import FrameReducer

torch.set_num_threads(1)

WIDTH, HIDDEN = 12, 16
CONFIGS = {
    "plain": ConnectorConfig(),
    "bare": ConnectorConfig(input_norm=False, positions=False),
    "stacked": ConnectorConfig(stack=4, max_tokens=5),
    "queries": ConnectorConfig(name="learned_query", queries=3, layers=2),
    "bare queries": ConnectorConfig(
        name="learned_query", queries=3, input_norm=False, positions=False
    ),
}


def build(key: str, tokens: int | None = None) -> Connector:
    torch.manual_seed(0)
    return build_connector(CONFIGS[key], WIDTH, HIDDEN, tokens)


def features(lengths: list[int], seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=5))
def test_a_medium_is_connected_as_if_it_were_alone(key, lengths):
    connector = build(key)
    packed = features(lengths)
    joined = connector(packed, lengths)
    assert joined.shape == (sum(map(connector.tokens, lengths)), HIDDEN)
    alone = [connector(part, [len(part)]) for part in packed.split(lengths)] if lengths else []
    assert torch.allclose(joined, torch.cat([torch.zeros(0, HIDDEN), *alone]), atol=1e-5)


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_leaves_gradients_of_zero(key, dtype):
    connector = build(key).to(dtype)
    out = connector(torch.zeros(0, WIDTH, dtype=torch.float16), [])
    assert out.shape == (0, HIDDEN)
    assert out.dtype == dtype
    out.sum().backward()
    for name, weight in connector.named_parameters():
        assert weight.grad is not None, name
        assert not weight.grad.any(), name


@pytest.mark.parametrize("key", CONFIGS)
def test_every_parameter_matters(key):
    connector = build(key)
    connector(features([21, 3]), [21, 3]).square().sum().backward()
    dead = [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("key", CONFIGS)
def test_bfloat16_is_close_to_float32(key):
    connector = build(key)
    exact = connector(features([9, 4]), [9, 4])
    rounded = connector.bfloat16()(features([9, 4]), [9, 4])
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05


def test_mlp_is_two_linear_layers_with_exact_gelu():
    connector = build("bare")
    first, _, second = connector.project
    x = features([5])
    hidden = x @ first.weight.T + first.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    assert torch.allclose(connector(x, [5]), hidden @ second.weight.T + second.bias, atol=1e-6)


def test_stacking_concatenates_fills_with_zeros_and_cuts():
    connector = build("stacked")
    x = features([6, 30])
    stacked = connector._stacked(x, [6, 30])
    assert stacked.shape == (2 + 5, 4 * WIDTH)
    assert torch.equal(stacked[0], x[:4].flatten())
    assert torch.equal(stacked[1], torch.cat([x[4], x[5], torch.zeros(2 * WIDTH)]))
    assert torch.equal(stacked[2:], x[6:26].view(5, 4 * WIDTH))
    # What is cut off has no influence.
    longer = torch.cat([x[:26], x[26:] + 1])
    assert torch.equal(connector(x, [6, 30]), connector(longer, [6, 30]))


def test_positions_count_within_a_medium():
    connector = build("plain", tokens=7)
    assert connector.positions.shape == (7, HIDDEN)
    x = features([1]).expand(10, -1)
    with torch.no_grad():
        out = connector(x, [7, 3])
        connector.positions.zero_()
        base = connector(x[:1], [1])
    assert torch.allclose(out[:3], out[7:], atol=1e-6)
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], base[0])
    with pytest.raises(ValueError, match="becomes 8 tokens; at most 7 fit"):
        connector(features([8]), [8])


def test_positions_are_no_more_than_can_occur():
    assert build("stacked").positions.shape[0] == 5
    assert build("stacked", tokens=9).positions.shape[0] == 3
    assert build("queries", tokens=25).positions.shape[0] == 3


def test_queries_differ_from_the_start_and_see_all_features():
    connector = build("bare queries")
    x = features([20]).requires_grad_()
    out = connector(x, [20])
    assert out.shape == (3, HIDDEN)
    assert torch.pdist(out).min() > 1e-3
    out[0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("lengths", [[4], [6, 0], [3, 4]])
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match="do not divide 6 features"):
        build("plain")(features([6]), lengths)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ConnectorConfig(name="linear"), "choose one of .*learned_query, .*mlp2x_gelu"),
        (ConnectorConfig(stack=0), "at least 1"),
        (ConnectorConfig(name="learned_query", queries=65), "between 1 and"),
        (ConnectorConfig(name="learned_query", stack=2), "no meaning"),
        (ConnectorConfig(name="learned_query", heads=5), "divides"),
        (ConnectorConfig(name="learned_query", layers=0), "at least one layer"),
    ],
)
def test_configurations_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        build_connector(config, WIDTH, HIDDEN, None)


def test_a_connector_is_added_by_registering_it():
    @register_connector("first_feature")
    class First(Connector):
        def __init__(self, config, feature_size, hidden_size, features):
            super().__init__(config, hidden_size, features)
            self.project = torch.nn.Linear(feature_size, hidden_size)

        def _connect(self, features, lengths):
            return self.project(features)

    config = ConnectorConfig(name="first_feature", positions=False)
    assert build_connector(config, WIDTH, HIDDEN, None)(features([2]), [2]).shape == (2, HIDDEN)


def test_the_same_seed_gives_the_same_connector():
    for key in CONFIGS:
        a, b = build(key).state_dict(), build(key).state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)


# --- one token per frame


def reducer() -> FrameReducer:
    torch.manual_seed(0)
    return FrameReducer(WIDTH, cells=4, channels=3, hidden=HIDDEN, frames=5)


def videos(count: int) -> torch.Tensor:
    return torch.randn(count, 5, 4, WIDTH, generator=torch.Generator().manual_seed(1))


def test_frames_become_one_token_each_in_order():
    module = reducer()
    x = videos(3)
    out = module(x)
    assert out.shape == (15, HIDDEN)
    # The second video's third frame alone decides its token.
    changed = x.clone()
    changed[1, 2] += 1 + torch.arange(WIDTH)
    moved = (module(changed) - out).abs().sum(1) > 1e-4
    assert moved.nonzero().flatten().tolist() == [7]
    # Order counts: a clip run backwards is another set of tokens.
    backwards = module(x.flip(1)).view(3, 5, HIDDEN)
    assert torch.cdist(backwards[0], out[:5]).min(1).values.max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_video_leaves_gradients_of_zero(dtype):
    module = reducer().to(dtype)
    out = module(videos(0).half())
    assert out.shape == (0, HIDDEN)
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    module(videos(2)).square().sum().backward()
    assert all(p.grad.any() for p in module.parameters())


def test_another_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="5 frames wanted, not of 4"):
        reducer()(videos(1)[:, :4])
