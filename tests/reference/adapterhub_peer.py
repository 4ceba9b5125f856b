"""Run by an interpreter that has the `adapters` library, not by ours: saves and opens its directories, so that the two can be compared.

python adapterhub_peer.py FOLDER PRESET: for FOLDER/base, with the token ids of FOLDER/ids.safetensors,
- opens FOLDER/ours and writes its hidden states,
- makes an adapter of PRESET with random values, saves it to FOLDER/theirs and writes its hidden states;
both to FOLDER/hidden.safetensors.
"""

import sys
from pathlib import Path

import adapters
import torch
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

PRESETS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4, cross_adapter=False),
    "cross": DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
    "pfeiffer": SeqBnConfig(reduction_factor=4),
    "block": BnConfig(
        mh_adapter=False,
        output_adapter=True,
        reduction_factor=4,
        non_linearity="gelu",
        original_ln_before=True,
        original_ln_after=False,
        residual_before_ln=False,
    ),
    "parallel": ParBnConfig(reduction_factor=4),
}
CLASSES = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}


def hidden(model, ids):
    with torch.no_grad():
        out = model.base_model(**ids) if model.config.is_encoder_decoder is False else model(**ids, output_hidden_states=True)
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.decoder_hidden_states[-1]


def opened(folder):
    family = AutoConfig.from_pretrained(folder / "base").model_type
    model = CLASSES.get(family, AutoModelForCausalLM).from_pretrained(folder / "base").eval()
    adapters.init(model)
    return model


def main(folder, preset):
    ids = load_file(folder / "ids.safetensors")
    model = opened(folder)
    info = {}
    model.load_adapter(str(folder / "ours"), set_active=True, use_safetensors=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    out = {"ours": hidden(model.eval(), ids)}
    model = opened(folder)
    model.add_adapter("theirs", config=PRESETS[preset], set_active=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters.theirs." in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_adapter(str(folder / "theirs"), "theirs", with_head=False, use_safetensors=True)
    out["theirs"] = hidden(model.eval(), ids)
    model.set_active_adapters(None)
    out["base"] = hidden(model, ids)
    save_file({k: v.contiguous() for k, v in out.items()}, folder / "hidden.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
