"""Generation over a broken link with a model whose recurrent states cannot be rolled back."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from raycloud.errors import LinkError, RaycloudError
from raycloud.link.channel import LinkDown
from raycloud.split.inference.blocks import StepRequest
from raycloud.split.inference.client import RemoteBlocks
from raycloud.split.plan import SplitPlan
from tests.split.wiring import BLOCKS, DRAWN, FIXED, NEW, PLANS, PROMPT, WIDTH, Script, cloud


@pytest.fixture(scope="module")
def model() -> Qwen3_5ForCausalLM:
    """Three blocks with a recurrent state, one with attention, and two more with a state."""
    config = Qwen3_5TextConfig(
        hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=97, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(4)
    return Qwen3_5ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def right(model: Qwen3_5ForCausalLM) -> list[int]:
    made = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NEW, eos_token_id=None)
    return made[0, len(PROMPT) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("plans", [FIXED, PLANS[1], DRAWN], ids=str)
def test_a_lost_session_changes_no_token(model: Qwen3_5ForCausalLM, right: list[int], plans: object) -> None:
    with cloud(model=model) as there:
        for lost in (0, 4, NEW - 2):
            made = []
            for token in there.edge(plans, chunk=7).stream(PROMPT, NEW):  # type: ignore[arg-type]
                if len(made) == lost:
                    there.forget()
                made.append(token)
            assert made == right, (plans, lost)


def test_a_broken_connection_changes_no_token(model: Qwen3_5ForCausalLM, right: list[int]) -> None:
    """Each event is lost once: before and after a message is sent, before and after its answer arrives."""
    events = 0

    def count(what: str, number: int, data: bytes) -> bytes:
        nonlocal events
        events = number
        return data

    with cloud(model=model) as there:
        assert list(there.edge(FIXED, Script(there.connect, count), chunk=16).stream(PROMPT, NEW)) == right
        for lost in range(4, events - 4, 3):

            def breaks(what: str, number: int, data: bytes, lost: int = lost) -> bytes:
                if number == lost:
                    raise LinkDown("broken by the test")
                return data

            made = list(there.edge(FIXED, Script(there.connect, breaks), chunk=16).stream(PROMPT, NEW))
            assert made == right, lost


def test_tokens_cannot_be_taken_back(model: Qwen3_5ForCausalLM) -> None:
    with cloud(model=model) as there:
        pipeline = there.edge(FIXED).open()
        pipeline.advance(torch.tensor([PROMPT[:10]]))
        with pytest.raises(RaycloudError, match="recurrent states, which cannot be rolled back from 10 to 4 tokens"):
            pipeline.rollback(4)
        pipeline.close()


def test_a_cloud_that_is_told_to_take_tokens_back_refuses_in_one_line(model: Qwen3_5ForCausalLM) -> None:
    with cloud(model=model) as there:
        middle = RemoteBlocks(there.connect, there.terms(FIXED))
        hidden = torch.randn(1, 4, WIDTH)
        middle.send(StepRequest(SplitPlan(2, 4), hidden, 0, 4, 0))
        middle.receive()
        middle.send(StepRequest(SplitPlan(2, 4), hidden, 2, 4, 2))
        with pytest.raises(LinkError, match="recurrent states, which cannot be rolled back from 4 to 2 tokens"):
            middle.receive()
        middle.close()
