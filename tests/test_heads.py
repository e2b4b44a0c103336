"""The head of real transformers models, built here: its parameters, and the comparison with the models' logits."""

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from epo_kernels.heads import check_head, head_of

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# Family, its settings, and (scale, softcap, whether there is a bias).
SERVED = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES), (None, None, False)),
    "tied": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**SIZES, tie_word_embeddings=True), (None, None, False)),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32), (None, None, False)),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0),
        (None, 3.0, False),
    ),
    "recurrent gemma": (
        hf.RecurrentGemmaForCausalLM,
        hf.RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=32),
        (None, 30.0, False),
    ),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig(**SIZES, logit_scale=0.25), (0.25, None, False)),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig(**SIZES, logits_scaling=2.5), (0.4, None, False)),
    "falcon h1": (
        hf.FalconH1ForCausalLM,
        hf.FalconH1Config(**SIZES, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16),
        (0.3, None, False),
    ),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig(**SIZES), (None, None, True)),
    "mpt": (
        hf.MptForCausalLM,  # which knows a logit_scale, and ignores it
        hf.MptConfig(vocab_size=97, d_model=32, n_heads=2, n_layers=1, logit_scale="inv_sqrt_d_model"),
        (None, None, False),
    ),
}


def make(family, config):
    torch.manual_seed(0)
    model = family(config).eval()
    with torch.no_grad():
        layer = model.get_output_embeddings()
        layer.weight.mul_(30)  # logits that a softcap bends
        if layer.bias is not None:
            layer.bias.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SERVED)
def test_what_families_do_to_their_logits(name, dtype):
    family, config, expected = SERVED[name]
    model = make(family, config).to(dtype)
    check_head(model)
    head = head_of(model)
    assert (head.logit_scale, head.logit_softcap, head.bias is not None) == expected
    ids = torch.arange(5)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # after the check, as before it
        logits = model(input_ids=ids, use_cache=False).logits.float()
    largest = float(logits.abs().max())
    assert largest > 0.5
    assert_close(head.logits(hidden), logits, rtol=0, atol=largest * (1e-5 if dtype == torch.float32 else 0.02))


class Doubled(hf.LlamaForCausalLM):
    """A model with custom code."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = 2 * output.logits
        return output


class Capped(hf.LlamaForCausalLM):
    """A softcap that only shows at large logits."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = 200 * torch.tanh(output.logits / 200)
        return output


class Shifted(hf.LlamaForCausalLM):
    """A bias that isn't the output layer's."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = output.logits + 0.01
        return output


@pytest.mark.parametrize("family", [Doubled, Capped, Shifted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_config_does_not_name_is_refused(family, dtype):
    with pytest.raises(ValueError, match=f"{family.__name__} does more between its last hidden states and its logits"):
        check_head(make(family, hf.LlamaConfig(**SIZES)).to(dtype))


def test_heads_that_are_networks_are_refused_by_name():
    for family, config in (
        (hf.BertLMHeadModel, hf.BertConfig(**SIZES, is_decoder=True)),
        (hf.RobertaForCausalLM, hf.RobertaConfig(**SIZES, is_decoder=True)),
        (hf.ElectraForCausalLM, hf.ElectraConfig(**SIZES, is_decoder=True, embedding_size=32)),
    ):
        with pytest.raises(ValueError, match=f"{family.__name__} does more"):
            check_head(family(config))
    with pytest.raises(ValueError, match="RemBertForCausalLM's logits cannot be computed from its last hidden states"):
        check_head(hf.RemBertForCausalLM(hf.RemBertConfig(**SIZES, is_decoder=True, output_embedding_size=48)))


def test_the_layers_do_not_run():
    """They may need a GPU, but the check runs before the model is moved there."""
    model = make(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("a layer ran"))
    check_head(model)
    assert "forward" not in vars(model.model)


def test_weights_that_cannot_be_read_are_not_compared():
    with torch.device("meta"):
        model = hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=2.0))
    check_head(model)
    assert head_of(model).logit_scale == 0.5


def test_an_output_layer_without_a_floating_weight_is_refused():
    model = make(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(97, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"floating-point weight, got torch.uint8: do not quantise"):
        head_of(model)
