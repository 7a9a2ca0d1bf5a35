"""Names of reward functions in TRL and open-r1, and what has their rule here."""

PEERS = {
    "accuracy": "boxed_math_reward",
    "reasoning_accuracy_reward": "boxed_math_reward, with the parameter after: </think>",
    "cosine_scaled_reward": "cosine_length_reward",
    "get_cosine_scaled_reward": "cosine_length_reward",
    "cosine": "cosine_length_reward",
    "repetition_penalty_reward": "repetition_reward",
    "get_repetition_penalty_reward": "repetition_reward",
    "repetition_penalty": "repetition_reward",
    "get_soft_overlong_punishment": "overlong_reward",
    "soft_overlong_punishment_reward": "overlong_reward",
    "soft_overlong_punishment": "overlong_reward",
    "format": "format_reward",
    "tag_count": "tag_count_reward",
    "reasoning_steps": "reasoning_steps_reward",
    "code_reward": "unit_test_reward, with the parameter column: verification_info",
    "code": "unit_test_reward, with the parameter column: verification_info",
}
