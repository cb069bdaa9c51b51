#!/usr/bin/env python
"""On-policy distillation from Python: the bundled student learns two-digit addition from the bundled teacher.

python scripts/onpolicy_distillation_example.py
torchrun --nproc_per_node 2 scripts/onpolicy_distillation_example.py
"""

from opd.api import OnPolicyDistillationTrainer


def question(a: int, b: int) -> dict:
    """A row: the prompt, and a function that judges a completion. The models answer with the digits reversed."""
    right = str(a + b)[::-1]
    return {"prompt": f"{a}+{b}=", "get_reward": lambda completion: float(completion == right)}


def main() -> None:
    rows = [question(a, b) for a in range(10, 100) for b in range(10, 100)]
    trainer = OnPolicyDistillationTrainer(
        model="bundled:tiny-student",
        teacher_model="bundled:tiny-teacher",
        train_dataset=[row for number, row in enumerate(rows) if number % 16],
        eval_dataset=rows[::16],
        eval_steps=100,
        ppo_steps=1,
        clip_eps=0.2,
        sampling_temperature=0.7,
        max_new_tokens=8,
        batch_size=64,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        max_steps=400,
        output_dir="runs/example",
        use_accelerate=True,
        options={"ppo.advantage_clip": 2.0, "sampling.batch_size": 256, "eval.batch_size": 512, "eval.kl_prompts": 256},
    )
    summary = trainer.train()
    if summary["reward_after"] < 0.85:
        raise SystemExit(f"the student answers only {summary['reward_after']:.0%}")


if __name__ == "__main__":
    main()
