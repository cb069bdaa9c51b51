"""Models with random weights: speed and memory do not depend on the values."""

from pathlib import Path


def make_random_qwen(folder: Path) -> None:
    """Save models in the shapes of Qwen2.5-0.5B and 1.5B to `folder`/student and `folder`/teacher."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    import opd

    tokenizer = AutoTokenizer.from_pretrained(Path(opd.__file__).parent / "assets" / "tiny-student")
    tokenizer.add_tokens(["<file_sep>"])
    shapes = {"student": (896, 4864, 24, 14), "teacher": (1536, 8960, 28, 12)}
    for role, (hidden, inner, layers, heads) in shapes.items():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
