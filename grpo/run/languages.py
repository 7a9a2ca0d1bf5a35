"""Labels of completions and results in the language of the task (`console_language`).

Covered: the held-out line and the tables of completions in training; the lines of `python -m grpo.evaluate`; the
labels of inference.py and its counts for a CSV. The step line, pass@k, comparisons, notes, warnings and errors are
always English, because programs parse them and users quote them when they need help.
"""

from typing import Any

EN = {
    "held_out": "held-out{name} after {step} steps: {results}",
    "held_out_loss": "loss {loss:.4f}, tokens right {right:.1%}",
    "held_out_accuracy": "accuracy {accuracy:.1%} ({how}), length {length:.1f}",
    "held_out_reward": "mean {name} {mean} ({how}), length {length:.1f}",
    "greedy": "greedy",
    "sampled": "mean of {count} samples",
    "completions": "completions of step {step}",
    "question": "question",
    "completion": "completion",
    "extracted": "extracted",
    "gold": "gold",
    "rewards": "rewards",
    "advantage": "advantage",
    "sum": "sum",
    "none": "none",
    "progress": "✅={correct} | Acc={share:.2%} | Pred: {pred} | GT: {gold}",
    "final": "Final accuracy: {share}",
    "strict": "strict extraction: {share}, 95% interval {low:.2%} to {high:.2%}",
    "lenient": "lenient extraction: {share}, 95% interval {low:.2%} to {high:.2%}",
    "choices": "refusal rate: {refused}; accuracy on answered: {answered}; unreadable: {unreadable}",
    "predicted": "{total} questions: {counts}; the last three are written as {refusal!r} to {out}",
    "refused": "refused",
    "unreadable": "unreadable",
    "not asked": "not asked",
    "ask": "❓ 问题: ",  # the same in every language: users search for these labels
    "answer": "💡 回答: ",
    "case": "[测试 {at}/{total}]",
}
ZH = {
    "held_out": "留出集{name}，第 {step} 步后：{results}",
    "held_out_loss": "损失 {loss:.4f}，词元正确率 {right:.1%}",
    "held_out_accuracy": "准确率 {accuracy:.1%}（{how}），长度 {length:.1f}",
    "held_out_reward": "{name} 平均 {mean}（{how}），长度 {length:.1f}",
    "greedy": "贪心解码",
    "sampled": "{count} 个采样回答的平均",
    "completions": "第 {step} 步的回答",
    "question": "问题",
    "completion": "回答",
    "extracted": "提取的答案",
    "gold": "标准答案",
    "rewards": "奖励",
    "advantage": "优势",
    "sum": "总和",
    "none": "无",
    "progress": "✅={correct} | 准确率={share:.2%} | 预测：{pred} | 标准答案：{gold}",
    "final": "最终准确率：{share}",
    "strict": "严格提取：{share}，95% 置信区间 {low:.2%} 至 {high:.2%}",
    "lenient": "宽松提取：{share}，95% 置信区间 {low:.2%} 至 {high:.2%}",
    "choices": "拒答率：{refused}；作答部分的准确率：{answered}；无法读出：{unreadable}",
    "predicted": "共 {total} 题：{counts}；后三类以 {refusal!r} 写入 {out}",
    "refused": "拒答",
    "unreadable": "无法读出",
    "not asked": "未提问",
    "ask": "❓ 问题: ",
    "answer": "💡 回答: ",
    "case": "[测试 {at}/{total}]",
}
ZH_HANT = {
    "held_out": "保留集{name}，第 {step} 步後：{results}",
    "held_out_loss": "損失 {loss:.4f}，詞元正確率 {right:.1%}",
    "held_out_accuracy": "正確率 {accuracy:.1%}（{how}），長度 {length:.1f}",
    "held_out_reward": "{name} 平均 {mean}（{how}），長度 {length:.1f}",
    "greedy": "貪婪解碼",
    "sampled": "{count} 個取樣回答的平均",
    "completions": "第 {step} 步的回答",
    "question": "題目",
    "completion": "回答",
    "extracted": "擷取的答案",
    "gold": "正確答案",
    "rewards": "獎勵",
    "advantage": "優勢",
    "sum": "總和",
    "none": "無",
    "progress": "✅={correct} | 正確率={share:.2%} | 預測：{pred} | 正確答案：{gold}",
    "final": "最終正確率：{share}",
    "strict": "嚴格擷取：{share}，95% 信賴區間 {low:.2%} 至 {high:.2%}",
    "lenient": "寬鬆擷取：{share}，95% 信賴區間 {low:.2%} 至 {high:.2%}",
    "choices": "拒答率：{refused}；作答部分的正確率：{answered}；無法讀出：{unreadable}",
    "predicted": "共 {total} 題：{counts}；後三類以 {refusal!r} 寫入 {out}",
    "refused": "拒答",
    "unreadable": "無法讀出",
    "not asked": "未提問",
    "ask": "❓ 問題: ",
    "answer": "💡 回答: ",
    "case": "[測試 {at}/{total}]",
}
LANGUAGES = {"en": EN, "zh": ZH, "zh-Hant": ZH_HANT}


def label(language: str, key: str, **values: Any) -> str:
    """A text of the console with its values filled in.

    >>> label("zh", "completions", step=10)
    '第 10 步的回答'
    """
    return LANGUAGES[language][key].format(**values)


def language_of(config: dict[str, Any]) -> str:
    """The language of a run, from the settings in its checkpoint; English when they do not name one.

    >>> language_of({"console_language": "zh"}), language_of({"console_language": ["x"]}), language_of({})
    ('zh', 'en', 'en')
    """
    language = config.get("console_language")
    return language if isinstance(language, str) and language in LANGUAGES else "en"
