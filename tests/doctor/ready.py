"""The ready configurations, each run for a few steps with a random model, and every finding that is true of such a run.

Lengths and batches are smaller, data and model stand-ins with the same columns; rewards, prompts and the algorithm are
the configuration's own. A random model writes noise in two languages, hence what is found.
"""

from tests.doctor.cases import Case

FEW = {
    "max_steps": 8,
    "max_prompt_length": 1500,
    "max_generate_length": 32,
    "eval_split_size": 0.1,
    "log_samples_steps": 4,
    "save_steps": 0,
    "report_to": "none",
    "device": "cpu",
    "num_threads": 1,
}
SMALL = {"batch_size": 2, "gradient_accumulation_steps": 1, "num_generations": 4}
NO_8BIT = {"load_in_4bit": False, "optimizer": "adamw"}


def ready(name: str, data: str, **more) -> Case:
    """A ready configuration with stand-ins."""
    return Case(FEW | SMALL | more, "bilingual", data, config=f"configs/{name}.yaml")


READY = {
    "ready_dapo_math": ready("dapo_math", "dapo", data_config=None, prompt_length_quantile=1.0),
    "ready_gsm8k": ready("gsm8k", "some_twice", data_config=None, max_answer_length=None, eval_steps=0),
    "ready_gsm8k_reasoning": ready("gsm8k_reasoning", "plain", data_config=None, eval_data=None, **NO_8BIT),
    "ready_gsm8k_zh": ready("gsm8k_zh", "zh"),
    "ready_json_answers": ready("json_answers", "json"),
    "ready_multiple_choice": ready("multiple_choice", "choices"),
}
NOISE = {"never_given", "language_switching"}  # of a random model: no reward, and Chinese among English
TRUE = {
    "ready_dapo_math": NOISE | {"stopped"},  # an adapter that nothing was learned into is not saved
    "ready_gsm8k": NOISE | {"never_ends"},  # its top_k and top_p leave out the end token
    "ready_gsm8k_reasoning": NOISE,
    "ready_gsm8k_zh": NOISE,
    "ready_json_answers": NOISE,
    "ready_multiple_choice": NOISE | {"stopped"},
}
