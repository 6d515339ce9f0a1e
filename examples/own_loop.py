"""A federation in a training loop of your own: two clients, two rounds, GLoRA on the server.

python examples/own_loop.py [FILE]
"""

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import fedspan

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)


def make_model(rank: int) -> PeftModel:
    """A small Llama with an adapter of that rank; replace it by a pretrained model of yours."""
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(CONFIG), lora)


def train(model: PeftModel, tokens: torch.Tensor) -> float:
    """Five steps on a client's own tokens; replace it by your own loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


clients = {"a": make_model(rank=8), "b": make_model(rank=4)}
tokens = {"a": torch.arange(60).reshape(6, 10), "b": torch.arange(24).reshape(3, 8)}

server = fedspan.Server("glora", base=clients["a"])
for _ in range(2):
    for name, model in clients.items():
        set_peft_model_state_dict(model, server.adapter(rank=model.peft_config["default"].r))
        print(name, train(model, tokens[name]))
    trained = {name: get_peft_model_state_dict(model) for name, model in clients.items()}
    report = server.update(trained, num_examples={name: len(rows) for name, rows in tokens.items()})
    print(report.round_num, report.weights, report.diagnostics)
server.save(sys.argv[1] if len(sys.argv) > 1 else "server.safetensors")
