"""诊断结果的中文文本；含义和占位符与 texts_en.py 相同。"""

RULES: dict[str, tuple[str, str, str]] = {
    "stopped": (
        "运行因错误而结束",
        "记录了 {steps} 步后以退出码 {code} 结束：{reason}",
        "按该行的提示处理，再执行同一条命令，运行会从最新的检查点继续。退出码的含义见 docs/zh/running.md。",
    ),
    "skipped_updates": (
        "出现非有限数值，更新被跳过",
        "{steps} 步中有 {count} 次更新出现 NaN 或 Inf，第一次在第 {at} 步；学习率最高为 {lr:g}。",
        "对 output_dir/anomalies 中的文件夹运行 python -m grpo.replay 查看原因。常见原因：lr 过高（除以 10）"
        "，或者模型需要 fp32 而 dtype 设为 bf16。",
    ),
    "no_reward": (
        "回答没有任何奖励",
        "{steps} 步中有 {count} 步，所有奖励函数对所有回答都返回 None，因此什么也没有学到。",
        "检查 rewards 以及函数读取的列：None 表示函数不适用或执行失败。stderr 中有失败的原因。",
    ),
    "reward_failures": (
        "奖励函数出错或太慢",
        "{name} 对 {share:.1%} 的回答失败（其中超时 {late:.1%}），共失败 {calls} 次。失败的调用不产生奖励。",
        "修正该函数，错误信息在 stderr 中。超时则增大 reward_timeout_s 或 reward_workers。",
    ),
    "never_given": (
        "有一个奖励从未给出",
        "在 {steps} 步的所有回答上 {name} 都是 {score:g}，它对梯度没有任何作用。",
        "如果上面的回答应该得到奖励，请修正 rewards 中的函数 {name}，或修改提示（system_prompt、"
        "prompt_template、example_answer），让模型写出该函数要读的内容。如果不应该，说明任务起步太难：先用带"
        "解答的数据训练（python -m grpo.sft），从更容易的问题开始，或为中间步骤增加奖励。",
    ),
    "too_hard": (
        "任务太难：大多数组里没有一个回答得到奖励",
        "第 {begin} 至 {end} 步，{share:.0%} 的组内奖励没有差异，平均奖励为 {mean:.3g}（奖励范围 {low:g} 至 "
        "{high:g}）。没有差异的组没有梯度。",
        "增大 num_generations，使更多的组里有正确的回答；从更容易的问题开始（difficulty_range），或先用带解答"
        "的数据训练（python -m grpo.sft）。filter_groups: resample 会另抽其他组来代替。",
    ),
    "too_easy": (
        "任务太容易：从一开始几乎每个回答都得到奖励",
        "前 {steps} 步，{share:.0%} 的组内奖励没有差异，平均奖励为 {mean:.3g}，最高为 {high:g}。可学的已经不多。",
        "使用更难的问题，或去掉总能答对的问题：difficulty_range，或 filter_groups: resample。从不落空的奖励也"
        "可能过于宽松：请读几个得到奖励的回答。",
    ),
    "one_sided": (
        "学会了一个奖励，另一个没有学会",
        "第 {begin} 至 {end} 步，{given} 的平均值为 {got:.3g}，几乎没有提升空间，而 {other} 停留在 {left:.3g}"
        "。这往往是只学会了格式，没有学会任务。",
        "在 rewards 中提高 {other} 的权重，或降低 {given} 的权重；让 {other} 可以达到（更容易的问题、部分得分"
        "、num_generations）。根据上面的回答检查 {other} 是否读得到模型所写的内容。",
    ),
    "identical_completions": (
        "同一组的回答完全相同",
        "第 {begin} 至 {end} 步，所记录的 {groups} 个组中有 {share:.0%} 只有一种文本；temperature 为 "
        "{temperature}，熵为 {entropy:.3g} nat。相同的回答奖励也相同，没有梯度。",
        "提高 temperature（通常为 1.0），关闭 top_k、top_p 和 min_p。如果是训练中变成这样，请设置 "
        "entropy_coef 或降低 lr。",
    ),
    "never_ends": (
        "没有一个回答自行结束",
        "{steps} 步中 {share:.0%} 的回答在 {limit} 个词元处被截断。",
        "如果上面的回答早已写完，说明模型不输出结束词元：设置 stop；对话模型则设置 chat_template。基础模型可"
        "以通过 python -m grpo.sft 学会结束。如果没有写完，请增大 max_generate_length。",
    ),
    "truncated": (
        "许多回答被长度上限截断，因而失去奖励",
        "第 {begin} 至 {end} 步，{share:.0%} 的回答在 {limit} 个词元处被截断。被截断的平均奖励：{cut:.3g}；正"
        "常结束的：{ended:.3g}。",
        "增大 max_generate_length，或在提示中要求更短的回答。truncated: mask 会让被截断的回答不计入损失。",
    ),
    "length_explosion": (
        "回答变长却没有变好",
        "平均长度从 {first:.1f} 增加到 {last:.1f} 个词元，而 {name} 从 {before:.3g} 变为 {after:.3g}。",
        "查看上面的回答是否有凑长度的内容。在 rewards 中降低鼓励长度的部分的权重；weighting 设为 dapo 或 "
        "dr_grpo 时不像 grpo 那样偏向长的错误回答；降低 lr。",
    ),
    "length_collapse": (
        "回答变得过短，影响了任务",
        "平均长度从 {first:.1f} 减少到 {last:.1f} 个词元，而 {name} 从 {before:.3g} 变为 {after:.3g}。",
        "在 rewards 中降低鼓励短回答的部分的权重；降低 lr；把 beta 设为大于 0，使模型不远离起点。",
    ),
    "repetition": (
        "模型重复自己的话",
        "第 {begin} 至 {end} 步，所记录的 {rows} 个回答中有 {share:.0%} 至少一半是重复内容。",
        "降低 lr，或把 beta 设为大于 0。如果一开始就这样：temperature 可能太低，或提示没有使用对话模板（"
        "chat_template）。如果重复会得到奖励，请修正奖励。",
    ),
    "language_switching": (
        "回答所用的文字与问题不同",
        "第 {begin} 至 {end} 步，所记录的 {rows} 个回答中有 {share:.0%} 有相当一部分是 {script}，而问题是 {asked}。",
        "在 system_prompt 中要求使用的语言，或在 rewards 中为此增加奖励。beta 大于 0 时，模型较少偏离起初的语言。",
    ),
    "reward_fell": (
        "奖励得而复失",
        "平均奖励在第 {at} 步附近为 {peak:.3g}，最后为 {last:.3g}。lr 最高为 {lr:g}，平均梯度范数为 "
        "{norm:.3g}（max_grad_norm 为 {max_norm}）。",
        "把 lr 降到二分之一或五分之一，使用 warmup_ratio 和 lr_schedule: cosine，或把 beta 设为大于 0。从下降"
        "之前的检查点继续：output_dir/best.json 记录了最好的一个。",
    ),
    "held_out_fell": (
        "奖励上升，留出集准确率却下降",
        "{name} 在第 {at} 步后为 {best:.1%}，最后为 {last:.1%}，而训练中的奖励从 {before:.3g} 变为 {after:.3g}。",
        "模型学到的是奖励所计的东西而不是任务，或者背下了训练问题：读一读它的回答，修正奖励，使用更多的问题或"
        "更少的轮数（epoch）。output_dir/best.json 记录了最好的检查点。",
    ),
    "entropy_collapse": (
        "模型还没有学会任务就不再探索",
        "熵从 {first:.3g} 降到 {last:.3g} nat；第 {begin} 至 {end} 步，{zero:.0%} 的组内奖励没有差异，平均奖"
        "励为 {mean:.3g}。",
        "设置 entropy_coef（0.001 至 0.01）或 entropy_target，提高 clip_eps_high（0.28），提高 temperature，"
        "或降低 lr（现在为 {lr:g}）。",
    ),
    "entropy_explosion": (
        "模型的输出变得随机",
        "熵从 {first:.3g} 增加到 {last:.3g} nat，而平均奖励从 {before:.3g} 降到 {after:.3g}。lr 最高为 {lr:g}"
        "，entropy_coef 为 {bonus}。",
        "降低 lr；设置了 entropy_coef 的也要降低。从下降之前的检查点继续。",
    ),
    "clip_share": (
        "策略在一步之内变化过大",
        "整个运行中平均有 {share:.0%} 的训练词元的梯度被裁剪（clip_eps 为 {eps}，每步 {updates} 次更新，lr 为"
        " {lr:g}，与采样策略的 KL 为 {kl:.3g}）。",
        "降低 lr、num_iterations 或 num_minibatches。",
    ),
    "grad_norm": (
        "梯度远大于裁剪值",
        "第 {begin} 至 {end} 步梯度范数的中位数为 {norm:.3g}（前三分之一为 {first:.3g}），而 max_grad_norm 为"
        " {limit}：更新的大小完全由裁剪决定。",
        "如果奖励下降或跳动，请降低 lr。否则检查奖励的尺度（scale_rewards: group）和 dtype。",
    ),
    "reward_flat": (
        "奖励没有上升",
        "{steps} 步中前三分之一为 {first:.3g}，后三分之一为 {last:.3g}（{z:+.1f} 个标准误），虽然组内奖励有差"
        "异。lr 最高为 {lr:g}；裁剪作用于 {clip:.1%} 的词元。",
        "如果最后的回答和开始时差不多，请把 lr 提高到三至十倍，或训练更久（epoch、max_steps）。如果不同，说明"
        "奖励没有区分好坏：请用几个回答检查它。",
    ),
    "sampler_gap": (
        "采样与训练的概率不一致",
        "两者对相同词元的对数概率平均相差 {gap:.3g}，最多相差 {largest:.3g}；有效样本量 {ess:.0%}；修正改变了"
        " {corrected:.1%} 的词元（dtype 为 {dtype}）。",
        "内存允许时使用 dtype: fp32。sampler_correction 和 max_importance_weight 决定如何修正；"
        "off_policy_threshold 去掉偏差最大的行。",
    ),
    "held_out_leak": (
        "留出的问题也用于训练",
        "{file} 的 {total} 个问题中有 {shared} 个在训练数据里（{share:.0%}）。",
        "从 data 中去掉它们，或把 eval_data 换成别的来源；eval_split_size 会从 data 中留出一部分。在此之前，"
        "留出集准确率并不是新问题上的准确率。",
    ),
    "duplicates": (
        "数据中有重复的问题",
        "第一轮所记录的 {groups} 个组中有 {again} 个重复了前面的问题；其中一个出现 {times} 次：{question}",
        "从 data 中去掉重复的行。重复的问题权重更大，还可能既被留出又用于训练。",
    ),
    "gold_differs": (
        "同一个问题有不同的标准答案",
        "所记录的 {questions} 个问题中有 {count} 个；例如：{question}（标准答案：{golds}）",
        "修正或去掉 data 中的这些行，或把区分它们的内容写进 prompt_template。一个回答不可能对两者都正确。",
    ),
    "left_out": (
        "许多问题因提示过长而被舍去",
        "舍去 {dropped} 个问题（{share:.0%}），保留 {kept} 个；max_prompt_length 为 {limit}。",
        "增大 max_prompt_length。",
    ),
    "slow_rewards": (
        "训练在等待奖励函数",
        "占 {share:.0%} 的时间：每步 {step:.2f} 秒中有 {seconds:.2f} 秒，每个进程的 reward_workers 为 {workers}。",
        "增大 reward_workers，不超过空闲的核数；让函数更快，等待服务器的函数可写成 async。",
    ),
    "long_tail": (
        "少数很长的回答拖住了采样",
        "采样占 {share:.0%} 的时间；每步最长的回答有 {longest:.0f} 个词元，平均只有 {mean:.0f} 个。",
        "设置 rollout_tokens 并增大 rollout_chunk_rows，让等待的行接替已结束的行；如果最长的回答得不到奖励，"
        "请减小 max_generate_length。",
    ),
    "slow_saves": (
        "训练在等待保存检查点",
        "{total:.1f} 秒的训练中有 {waited:.1f} 秒在等待保存（{share:.0%}）；save_steps 为 {every}。",
        "增大 save_steps，设置 save_in_background: true，或把 output_dir 放在更快的磁盘上。",
    ),
    "idle_ranks": (
        "进程在等待最慢的一个",
        "在 {phase} 阶段（占 {share:.0%} 的时间），平均每个进程有 {idle:.0%} 的时间在等待。",
        "减小 rollout_chunk_rows（rollout）或 micro_batch_tokens（micro_batches），使分块多于进程；增大 "
        "batch_size；确认没有进程与其他任务共用核或 GPU。",
    ),
    "out_of_memory": (
        "内存不足，任务被分半执行",
        "{rollout} 个采样分块和 {update} 个微批次被分半。训练内容不变，但损失了时间。",
        "把 rollout_chunk_rows 或 micro_batch_tokens 减小到放得下的值；python -m grpo.plan 可以计算。",
    ),
}

WHY = {
    "empty": "它是空的",
    "other_answer": "它的答案 {extracted} 不是标准答案 {gold}",
    "cut": "在写出答案之前就被截断",
    "not_where_read": "它含有标准答案 {gold}，但奖励读取别处，或另有要求",
    "no_marks": "缺少奖励或提示所要求的答案标记",
    "no_gold": "标准答案 {gold} 不在其中",
}

LABELS = {
    "run": "运行 {name}：{steps} 步，记录了 {rows} 个回答",
    "unreadable": "有 {count} 行无法读取，已略去",
    "no_config": "不知道该运行的设置：上限由其指标估计",
    "few": "只记录了 {steps} 步：大多数规则需要 4 至 12 步",
    "none": "没有发现问题",
    "evidence": "依据",
    "change": "建议",
    "example": "第 {step} 步的回答，奖励 {reward}",
    "question": "问题",
    "completion": "回答",
    "gold": "标准答案",
    "extracted": "提取的答案",
    "why": "没有奖励的原因",
    "nothing": "无",
    "short": "诊断：{count} 项发现，首先是：{what}。全部：python -m grpo.doctor {folder}",
    "short_one": "诊断：{what}。详情：python -m grpo.doctor {folder}",
}
