"""A plugin of SGLang, which loads it in each of its processes: what ``--device cpu`` lacks where there is no AMX."""

import torch


def register():
    """Replace the attention over a cached prefix, and let rope and MLA take paths that a CPU can run."""
    from sglang.srt.utils import is_cpu

    if not is_cpu():
        return
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    TorchNativeAttnBackend._run_sdpa_forward_extend = _extend
    _allow_plain_rope()
    _absorb_mla()
    # Some of SGLang's code names CUDA's streams whatever the device.
    torch.cuda.Stream, torch.cuda.stream = torch.cpu.Stream, torch.cpu.stream
    if not hasattr(torch.cpu.Stream, "synchronize"):
        torch.cpu.Stream.synchronize = lambda self: None


def _extend(
    self,
    query,
    output,
    k_cache,
    v_cache,
    req_to_token,
    req_pool_indices,
    seq_lens,
    extend_prefix_lens,
    extend_seq_lens,
    encoder_lens=None,
    scaling=None,
    enable_gqa=False,
    causal=False,
    is_cross_attn=False,
    sliding_window_size=None,
):
    """As SGLang's own, which pads the query to the whole sequence, so that a cached prefix saves nothing: here it has the new rows only."""
    if encoder_lens is not None or is_cross_attn:
        raise NotImplementedError("encoders are not served here")
    window = sliding_window_size if sliding_window_size is not None and sliding_window_size >= 0 else None
    start = 0
    lengths = zip(seq_lens.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True)
    for request, (total, cached, new) in enumerate(lengths):
        if not new:
            continue
        slots = req_to_token[req_pool_indices[request], :total]
        rows = slice(start, start + new)
        heads_first = [
            tensor.to(query.dtype).transpose(0, 1).unsqueeze(0)
            for tensor in (query[rows], k_cache[slots], v_cache[slots])
        ]
        whole = causal and not cached and window is None
        attended = torch.nn.functional.scaled_dot_product_attention(
            *heads_first,
            attn_mask=_mask(cached, total, window) if causal and not whole else None,
            is_causal=whole,
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output[rows] = attended[0].transpose(0, 1)
        start += new
    return output


def _mask(cached, total, window):
    """bool [new, total]: which places each new token may look at."""
    query = torch.arange(cached, total).unsqueeze(1)
    key = torch.arange(total).unsqueeze(0)
    seen = key <= query
    return seen if window is None else seen & (key >= query - window)


def _allow_plain_rope():
    """SGLang's rope for CPUs knows one kind of scaling only; without any it may be the plain one."""
    try:
        from sglang.srt.layers.rotary_embedding import factory

        for_cpu, plain = factory.get_rope_cpu, factory.get_rope
    except (ImportError, AttributeError):  # not in this version
        return

    def get_rope(
        head_size,
        rotary_dim,
        max_position,
        base,
        is_neox_style=True,
        rope_scaling=None,
        dtype=None,
        factor=1.0,
        device=None,
    ):
        arguments = (head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, dtype, factor)
        return plain(*arguments) if rope_scaling is None else for_cpu(*arguments, device)

    factory.get_rope_cpu = get_rope


def _absorb_mla():
    """The attention in torch reads the latent pool, so MLA always takes the absorbed path."""
    try:
        from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
    except ImportError:  # not in this version
        return
    handlers.AttentionBackendRegistry.register(
        "torch_native", lambda attention, batch: handlers.AttnForwardMethod.MLA
    )
