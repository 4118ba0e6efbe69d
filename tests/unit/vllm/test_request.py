"""What a request's keys depend on besides its tokens: adapter, salt, images; and when tokens do not tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from flexkv_core.keys import KeyChain, namespace_root
from flexkv_vllm.compat.request import is_cacheable, namespace_of, salts_of

TOKENS = list(range(64))


def request(**fields: Any) -> Any:
    defaults = {
        "lora_request": None,
        "cache_salt": None,
        "mm_features": [],
        "prompt_embeds": None,
        "resumable": False,
    }
    return SimpleNamespace(**{**defaults, **fields})


def keys(made: Any) -> bytes:
    chain = KeyChain(namespace_root(bytes(16), namespace_of(made)), 16, salts_of(made))
    chain.extend(TOKENS, len(TOKENS))
    return chain.keys(4)


def image(identifier: str, offset: int) -> MultiModalFeatureSpec:
    position = PlaceholderRange(offset=offset, length=10)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=identifier, mm_position=position)


def test_adapters_salts_and_images_do_not_share() -> None:
    made = [
        request(),
        request(lora_request=LoRARequest("a", 1, "/adapters/a")),
        request(lora_request=LoRARequest("b", 2, "/adapters/b")),
        request(lora_request=LoRARequest("a", 1, "/adapters/a2")),
        request(cache_salt="a"),
        request(cache_salt="b"),
        request(lora_request=LoRARequest("a", 1, "/adapters/a"), cache_salt="a"),
        request(mm_features=[image("x", 3)]),
        request(mm_features=[image("y", 3)]),
        request(mm_features=[image("x", 4)]),
    ]
    first_blocks = [keys(one)[:16] for one in made]
    assert len(set(first_blocks)) == len(made)


def test_image_leaves_the_blocks_before_it_shared() -> None:
    plain, with_image = keys(request()), keys(request(mm_features=[image("x", 35)]))
    assert plain[:32] == with_image[:32]
    assert plain[32:48] != with_image[32:48]
    assert plain[48:] != with_image[48:]


def test_tokens_that_do_not_tell_are_not_cached() -> None:
    assert is_cacheable(request())
    assert not is_cacheable(request(prompt_embeds=object()))
    assert not is_cacheable(request(resumable=True))
