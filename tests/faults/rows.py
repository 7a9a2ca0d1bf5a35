"""The faults of the plan, by number, and which of them are tried by tests outside this folder."""

ROWS = {
    "F1": "SIGKILL of the whole job at a random instant",
    "F2": "SIGKILL in each part of a save, on each rank",
    "F3": "SIGKILL or an exception in one rank",
    "F4": "a rank that stands still",
    "F5": "a slow rank",
    "F6": "SIGTERM in each phase",
    "F7": "SIGTERM during a reward of 60 s",
    "F8": "a second SIGTERM or SIGINT",
    "F9": "SIGTERM to one rank",
    "F10": "disk full while saving",
    "F11": "EIO, EFBIG, a read-only disk while saving",
    "F12": "one bit of a checkpoint flipped",
    "F13": "a file of a checkpoint cut short",
    "F14": "files of a checkpoint missing, added, renamed, swapped",
    "F15": "a stale or hostile pointer to the latest checkpoint",
    "F16": "resuming on another number of ranks and another backend",
    "F17": "resuming with changed settings, data, model, rewards",
    "F18": "resuming a finished run, twice, from nothing",
    "F19": "control: a resume that forgets something",
    "F20": "NaN or Inf in logits, loss, gradient",
    "F21": "NaN in every step",
    "F22": "NaN where the mask says that nothing counts",
    "F23": "a reward that raises",
    "F24": "a reward that hangs",
    "F25": "a reward that returns nonsense",
    "F26": "a reward under attack by the text it scores",
    "F27": "rewards of a group that are equal, nearly equal, few, many",
    "F28": "empty, endless and odd completions and stop tokens",
    "F29": "odd prompts",
    "F30": "data of 0, 1, G-1, P-1, P, P+1 rows",
    "F31": "a rank without work",
    "F32": "ranks that disagree",
    "F33": "a bit of a weight or moment flipped in memory",
    "F34": "a busy port, four runs at once",
    "F35": "SIGKILL of torchrun",
    "F36": "the clock turned back, another time zone",
    "F37": "the folder of curves full, read-only, deleted",
    "F38": "curves after three crashes",
    "F39": "a malicious checkpoint",
    "F40": "wrong settings",
    "F41": "too little memory",
    "F42": "forty restarts",
}

ELSEWHERE = {  # fault -> tests that are its tries: file, and a pattern that the test's name matches from its start
    "F23": [
        (
            "test_isolation.py",
            r"test_an_attack.*\[\w+-(system_exit|interrupt|base_exception|recursion|stack_overflow|odd_object|exits_hard)\]",
        ),
        ("test_rewards.py", r"test_misbehaviour.*\[exception\]"),
        ("test_rewards.py", r"test_too_many_failures"),
    ],
    "F24": [
        (
            "test_isolation.py",
            r"test_an_attack.*\[\w+-(loop|regex|deaf|c_loop|power|stops_itself|daemon|code_hangs|kills_parent)\]",
        ),
        ("test_isolation.py", r"test_the_string_that_hangs_math_verify"),
    ],
    "F25": [
        ("test_rewards.py", r"test_(misbehaviour|what_counts_as_a_number|none_means_not_applicable)"),
        ("test_isolation.py", r"test_an_attack.*\[\w+-long_(text|list)\]"),
    ],
    "F26": [
        (
            "test_isolation.py",
            r"test_an_attack.*\[\w+-(bomb|segfault|ten_gigabytes|many_megabytes|prints|writes|closes|patches|forges|traces"
            r"|kills_worker|code_exits|code_bomb)\]",
        ),
        ("test_isolation.py", r"test_(what_a_call_leaves|there_is_no_network|the_environment_is_scrubbed)"),
        ("test_isolation.py", r"test_a_function_that_runs_code"),
    ],
    "F28": [
        ("test_exchange.py", r"test_masks_come_from_lengths"),
        ("test_untrusted_checkpoints.py", r"test_(tokenizers_of_all_kinds|a_run_with_tokens_beyond_the_model)"),
    ],
    "F29": [("test_untrusted_data.py", r"test_odd_questions"), ("test_untrusted_templates.py", r"test_half_a_surro")],
    "F30": [("test_untrusted_data.py", r"test_(datasets_of_odd_size|a_file_without_rows)")],
    "F39": [
        ("test_untrusted_checkpoints.py", r"test_(model_folders|checkpoints|a_run_goes_on|counters|moments|json)"),
        ("test_untrusted_templates.py", r"test_(hostile_templates|a_template_that_turns_bad)"),
    ],
    "F40": [("test_bad_config.py", r"test_"), ("test_bad_input.py", r"test_(settings|config_files|data_rewards)")],
}
