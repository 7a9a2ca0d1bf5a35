"""The same rollouts, the same rewards, one SGD step: TRL's GRPOTrainer and this trainer move the weights alike.

Optional: TRL is no dependency. `pip install trl==1.16.0` beside the project, then

    pytest tests/training/test_trl_parity.py --full -s          (-s shows the measured differences)

Rollouts reach TRL through `rollout_func`, and this trainer through the plan and exchange of training, so that rows that
are left out, several micro-batches and the denominators are part of the comparison. Chance cannot pass: a wrong
denominator, or a missing KL term, is off by more than 1e-2, which each test asserts too.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo.config.settings import Config, updates_per_step
from grpo.forward.token_entropy import entropy_of
from grpo.models.checks import load_model
from grpo.models.loading import load_tokenizer
from grpo.runtime.distributed import start
from grpo.training import entropy, other_advantages
from grpo.training.draws import Draws
from grpo.training.exchange import deliver
from grpo.training.kl_in_reward import put_kl_into_rewards
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.policy import Policy
from grpo.training.reference_renewal import renew_reference
from grpo.training.scoring import Scored
from grpo.types import Completion, Prompt
from tests.support.rank_jobs import table_of
from tests.support.tiny import save_tiny

trl = pytest.importorskip("trl", reason="TRL is not installed (optional: pip install trl==1.16.0)")
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

QUESTIONS = ["Mia has 7 pears.", "She buys 3, eats 2.", "How many pears does she have now?"]
G, MAX_LENGTH, TEMPERATURE, LR = 4, 24, 0.9, 1.0
TOLERANCE, BROKEN = 1e-5, 1e-2
PARTS = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "steps_per_generation": 2}  # of TRL
WHOLE = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "steps_per_generation": 1}  # one part
WEIGHTS = (1.0, 0.5)  # of two rewards, where there are two
OTHER_LOSS = {"grpo": "dapo", "dapo": "grpo", "dr_grpo": "dapo"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder: the reference, and the start of the policy before `pushed`."""
    return save_tiny(tmp_path_factory.mktemp("base"))


def pushed(model, size=0.3):
    """Move every weight a little at random, so that policy and reference differ and the KL term pulls."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def rollouts(tokenizer):
    """Prompts, completions of many lengths, rewards [N]; the second group's rewards are all equal."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(p, text, tuple(tokenizer(text)["input_ids"]), {}) for p, text in enumerate(QUESTIONS)]
    lengths = rng.integers(1, MAX_LENGTH + 1, len(prompts) * G)
    lengths[0] = MAX_LENGTH
    completions = []
    for n, length in enumerate(lengths):  # every third one has ended by itself
        ids = rng.integers(3, len(tokenizer), length).astype(np.int32)
        ids[-1] = tokenizer.eos_token_id if n % 3 == 0 else ids[-1]
        completions.append(Completion(n, ids, np.zeros(length, np.float32), "length" if n % 3 else "stop"))
    rewards = rng.normal(size=len(completions))
    rewards[G : 2 * G] = 0.5
    return prompts, completions, rewards


def second_of(ids):
    """Another reward of a completion, of another spread."""
    return 3.0 * (sum(ids) % 5) + len(ids) / MAX_LENGTH


def movement(model, before):
    """The change of every weight, as one vector."""
    return torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()])


def start_model(base):
    model = pushed(load_model(str(base), torch.device("cpu")))
    return model, {name: p.detach().clone() for name, p in model.named_parameters()}


def arguments(out, beta, num_updates, steps):
    """Options of both trainers."""
    return dict(
        output_dir=str(out),
        beta=beta,
        num_generations=G,
        num_iterations=num_updates,
        max_steps=num_updates * steps,
        max_completion_length=MAX_LENGTH,
        temperature=TEMPERATURE,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        disable_dropout=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def trl_movement(base, out, loss, beta, num_updates=1, steps=1, **more):
    """TRL's SGD on the injected rollouts, the same in every step. more: options of GRPOConfig."""
    tokenizer = load_tokenizer(str(base))
    prompts, completions, rewards = rollouts(tokenizer)
    ids_of = {p.text: [completions[p.data_row * G + g].token_ids.tolist() for g in range(G)] for p in prompts}
    reward_of = {tuple(c.token_ids.tolist()): float(r) for c, r in zip(completions, rewards, strict=True)}

    def inject(texts, trainer):
        chosen = [ids_of[text][texts[:i].count(text)] for i, text in enumerate(texts)]
        return {
            "prompt_ids": [tokenizer(text)["input_ids"] for text in texts],
            "completion_ids": chosen,
            "logprobs": [[0.0] * len(ids) for ids in chosen],
        }

    def injected_reward(completion_ids, **columns):
        return [reward_of[tuple(ids)] for ids in completion_ids]

    def second_reward(completion_ids, **columns):
        return [second_of(ids) for ids in completion_ids]

    model, before = start_model(base)  # its config names the folder, from where TRL loads the reference
    options = {"use_bias_correction_kl": False, "scale_rewards": "none"} | PARTS | more
    args = trl.GRPOConfig(loss_type=loss, **options, **arguments(out, beta, num_updates, steps))
    trl.GRPOTrainer(
        model=model,
        reward_funcs=[injected_reward, second_reward] if "reward_weights" in more else injected_reward,
        args=args,
        processing_class=tokenizer,
        rollout_func=inject,
        train_dataset=datasets.Dataset.from_dict({"prompt": QUESTIONS}),
    ).train()
    return movement(model, before)


def rloo_movement(base, out, beta):
    """One SGD step of TRL's RLOOTrainer, whose completions are given in place of generated ones."""
    tokenizer = load_tokenizer(str(base))
    prompts, completions, rewards = rollouts(tokenizer)
    rows_of = {p.text: [completions[p.data_row * G + g] for g in range(G)] for p in prompts}
    reward_of = {tuple(c.token_ids.tolist()): float(r) for c, r in zip(completions, rewards, strict=True)}

    class Injected(trl.RLOOTrainer):
        def _generate(self, texts):
            chosen = [rows_of[text][texts[:i].count(text)].token_ids.tolist() for i, text in enumerate(texts)]
            return [tokenizer(text)["input_ids"] for text in texts], chosen, tokenizer.batch_decode(chosen)

    model, before = start_model(base)
    args = trl.RLOOConfig(normalize_advantages=False, **PARTS, **arguments(out, beta, 1, 1))
    Injected(
        model=model,
        reward_funcs=lambda completion_ids, **columns: [reward_of[tuple(ids)] for ids in completion_ids],
        args=args,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": QUESTIONS}),
    ).train()
    return movement(model, before)


def our_movement(base, loss, beta, num_updates=1, steps=1, **more):
    """SGD with our gradients: the plan, delivery, log-probs and loss of training, in several micro-batches.

    Every step has the same rollouts. Also returns the share of tokens that the last pass clipped.
    """
    cfg = Config(
        weighting=loss,
        beta=beta,
        **{"scale_rewards": "none"} | more,
        num_generations=G,
        batch_size=len(QUESTIONS),
        gradient_accumulation_steps=1,
        num_iterations=num_updates,
        max_generate_length=MAX_LENGTH,
        temperature=TEMPERATURE,
        micro_batch_tokens=50,
        logits_chunk_mb=1,
        device="cpu",
    )
    world = start()
    prompts, completions, rewards = rollouts(load_tokenizer(str(base)))
    model, before = start_model(base)
    policy = Policy(cfg, world, model, load_model(str(base), world.device) if beta else None)
    lengths = np.array([len(c.token_ids) for c in completions])
    table = table_of(cfg, lengths, np.zeros(len(lengths)))
    if cfg.truncated == "mask":
        completions = [c.without_loss() if c.finish == "length" else c for c in completions]
    if cfg.top_entropy_share < 1 or cfg.kl_estimator == "k1_reward":
        completions = [as_sampled(model, prompts[c.row // G], c) for c in completions]
    trained = np.array([np.count_nonzero(c.trained) for c in completions])
    table = dataclasses.replace(table, facts=table.facts | {"trained": trained})
    table = dataclasses.replace(table, rewards=rewards)
    if cfg.normalize_each_reward:
        scores = np.column_stack([rewards, [second_of(c.token_ids.tolist()) for c in completions]])
        table = dataclasses.replace(table, scores=scores, rewards=scores @ WEIGHTS, reward_weights=WEIGHTS)
    draws, tally = Draws(SimpleNamespace(cfg=cfg, world=world), 0), Tally()
    draws.add(prompts, Scored(completions, [], table.scores, table.faults, len(completions)), table)
    put_kl_into_rewards(draws, policy, tally)
    advantages = draws.advantages()
    plan = make_plan(cfg, prompts, lengths, advantages, world.size, num_trained=trained)
    assert len(plan[0].micro_batches) > 1
    parameters = list(model.parameters())
    for update in range(steps * updates_per_step(cfg)):
        if update % updates_per_step(cfg) == 0:
            policy.counters.trust_sampler = False  # old log-probs are the policy's
            [minibatch] = policy.annotate(deliver(world, cfg, plan, prompts, completions, table, advantages))
            policy.counters.trust_sampler = True  # no correction for the sampler: its log-probs are made up
        tally = Tally()
        summed = [torch.zeros_like(parameter) for parameter in parameters]
        for micro in minibatch:
            gradients = torch.autograd.grad(policy.loss(micro, tally, weights_unchanged=False), parameters)
            for total, gradient in zip(summed, gradients, strict=True):
                total.add_(gradient)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, summed, strict=True):
                parameter.sub_(LR * gradient)
        policy.entropy.after_update(policy.counters, tally)
        policy.entropy.parts.clear()
        if (update + 1) % updates_per_step(cfg) == 0:
            renew_reference(policy, (update + 1) // updates_per_step(cfg))
    metrics = tally.reduce(world).metrics
    return movement(model, before), metrics.get("clip/low", 0.0) + metrics.get("clip/high", 0.0)


@torch.no_grad()
def as_sampled(model, prompt, completion):
    """With the log-probs and entropies that the engine would have recorded."""
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids[:-1].tolist()]])
    logits = model(input_ids=ids).logits[0, len(prompt.token_ids) - 1 :].double() / TEMPERATURE
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids.tolist())[:, None])[:, 0]
    values = {"sampler_logprobs": chosen.float().numpy(), "entropy": entropy_of(logits).float().numpy()}
    return dataclasses.replace(completion, **values)


def apart(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_one_sgd_step_moves_the_weights_as_trl_does(base, tmp_path, loss, beta):
    theirs = trl_movement(base, tmp_path, loss, beta)
    same = apart(our_movement(base, loss, beta)[0], theirs)
    other_loss = apart(our_movement(base, OTHER_LOSS[loss], beta)[0], theirs)
    other_beta = apart(our_movement(base, loss, 0.04 - beta)[0], theirs)
    print(
        f"\n{loss:8} beta {beta}: {same:.1e}  weights of {OTHER_LOSS[loss]}: {other_loss:.1e}  "
        f"beta {0.04 - beta}: {other_beta:.1e}"
    )
    assert same <= TOLERANCE
    assert other_loss > BROKEN
    assert other_beta > BROKEN


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_a_second_pass_over_the_same_rows_clips_as_trl_does(base, tmp_path, loss):
    theirs = trl_movement(base, tmp_path, loss, 0.04, num_updates=2)
    ours, clipped = our_movement(base, loss, 0.04, num_updates=2)
    print(f"\n{loss:8} beta 0.04, two passes: {apart(ours, theirs):.1e}, {clipped:.1%} of the tokens clipped")
    assert clipped > 0.05
    assert apart(ours, theirs) <= TOLERANCE


PPO = {"surrogate": "ppo_clip"}
BATCH = {"baseline": "batch", "scale_rewards": "batch"}
GDPO = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": list(WEIGHTS)}
DISTANCE = 5.9  # 0 - log-prob is above it on average in two of the four rows of negative advantage
NO_MASK = {"off_policy_threshold": None}
VARIATIONS = {  # weighting here, our settings, TRL's loss_type and options, our settings of a broken control
    "cispo": ("dapo", {"surrogate": "cispo", "clip_eps_high": 0.3}, "cispo", {"epsilon_high": 1.3}, PPO),
    "sapo": ("grpo", {"surrogate": "sapo"}, "sapo", {}, PPO),
    "gspo": ("grpo", {"ratio": "sequence"}, "grpo", {"importance_sampling_level": "sequence"}, {"ratio": "token"}),
    "delta": ("grpo", {"clip_ratio_max": 1.3}, "grpo", {"delta": 1.3}, {"clip_ratio_max": None}),
    "KL": ("grpo", {"kl_estimator": "k3_weighted"}, "grpo", {"use_bias_correction_kl": True}, {"kl_estimator": "k3"}),
    "batch": ("grpo", {"scale_rewards": "batch"}, "grpo", {"scale_rewards": "batch"}, {"scale_rewards": "none"}),
    "GDPO": ("grpo", {"normalize_each_reward": True, **BATCH}, "grpo", GDPO, {"scale_rewards": "group"}),
    "off-policy": (
        "grpo",
        {"off_policy_threshold": DISTANCE},
        "grpo",
        {"off_policy_mask_threshold": DISTANCE},
        NO_MASK,
    ),
    "cut": ("dapo", {"truncated": "mask"}, "dapo", {"mask_truncated_completions": True}, {"truncated": "train"}),
}


@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_move_the_weights_as_trl_does(name, num_updates, base, tmp_path, monkeypatch):
    monkeypatch.setattr(other_advantages, "STD_EPS", 1e-4)  # theirs
    weighting, settings, loss, options, broken = VARIATIONS[name]
    theirs = trl_movement(base, tmp_path, loss, 0.4, num_updates, **options)
    ours, clipped = our_movement(base, weighting, 0.4, num_updates, **settings)
    other, _ = our_movement(base, weighting, 0.4, num_updates, **settings | broken)
    same, control = apart(ours, theirs), apart(other, theirs)
    print(f"\n{name}, {num_updates} passes: {same:.1e}, control {control:.1e}, {clipped:.1%} clipped")
    assert same <= TOLERANCE
    on_policy = num_updates == 1 and name in ("cispo", "sapo", "gspo", "delta")  # ratios are 1: equal gradients
    assert on_policy or control > BROKEN


ENTROPY = {  # passes, our settings, TRL's options, our settings of a broken control
    "share": (1, {"top_entropy_share": 0.2}, {"top_entropy_quantile": 0.2}, {"top_entropy_share": 0.3}),
    "bonus": (2, {"entropy_coef": 0.5}, {"entropy_coef": 0.5}, {"entropy_coef": 0.4}),
    "both": (
        1,
        {"top_entropy_share": 0.2, "entropy_coef": 0.5},
        {"top_entropy_quantile": 0.2, "entropy_coef": 0.5},
        {"top_entropy_share": 1.0},
    ),
    "adaptive": (  # without a bonus in the first pass
        2,
        {"entropy_coef": 0.5, "entropy_target": 9.0, "entropy_coef_step": 0.25},
        {"entropy_coef": 0.5, "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.25},
        {"entropy_coef": 0.25},
    ),
}


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
@pytest.mark.parametrize("name", ENTROPY)
def test_entropy_moves_the_weights_as_in_trl(name, loss, base, tmp_path, monkeypatch):
    """TRL computes one part of all rows, because its quantile and its mean are those of a part; here there are several.

    One pass with a share: TRL chooses the tokens anew in each.
    """
    passes, settings, options, broken = ENTROPY[name]
    theirs = trl_movement(base, tmp_path, loss, 0.04, passes, **WHOLE, **options)
    ours, _ = our_movement(base, loss, 0.04, passes, **settings)
    other, _ = our_movement(base, loss, 0.04, passes, **settings | broken)
    monkeypatch.setattr(entropy, "records_entropy", lambda cfg: False)
    scored, _ = our_movement(base, loss, 0.04, passes, **settings)
    same, control = apart(ours, theirs), apart(other, theirs)
    print(f"\n{name}, {loss}: {same:.1e}, nothing recorded {apart(scored, theirs):.1e}, control {control:.1e}")
    assert same <= TOLERANCE and apart(scored, theirs) <= TOLERANCE
    assert control > BROKEN


def test_a_kl_in_the_reward_moves_the_weights_as_in_rloo(base, tmp_path):
    """TRL's RLOOTrainer, one pass: its ratio is the product over a row, which is 1 there; its loss is the mean over
    rows of the sum over tokens. Controls: half the KL; none, where the group of equal rewards has no advantage."""
    (tmp_path / "rows.py").write_text(
        "import numpy as np\n\n\ndef rows(num_trained, max_length):\n"
        "    return np.full(len(num_trained), 1 / len(num_trained))\n"
    )
    beta, loss = 0.4, f"{tmp_path}/rows.py:rows"
    how = {"baseline": "leave_one_out", "kl_estimator": "k1_reward"}
    theirs = rloo_movement(base, tmp_path / "out", beta)
    same, half = (apart(our_movement(base, loss, b, **how)[0], theirs) for b in (beta, beta / 2))
    none = apart(our_movement(base, loss, 0.0, baseline="leave_one_out")[0], theirs)
    print(f"\nk1_reward: {same:.1e}, half the KL {half:.1e}, none {none:.1e}")
    assert same <= TOLERANCE
    assert half > BROKEN and none > BROKEN


@pytest.mark.parametrize("mixup", [0.6, 1.0])
@pytest.mark.parametrize("every", [1, 2])
def test_a_renewed_reference_moves_the_weights_as_in_trl(every, mixup, base, tmp_path):
    """Three steps. Controls: a reference that stays, and another mixture."""
    options = {"sync_ref_model": True, "ref_model_sync_steps": every, "ref_model_mixup_alpha": mixup}
    theirs = trl_movement(base, tmp_path, "grpo", 0.4, steps=3, **options)
    ours = {
        name: apart(our_movement(base, "grpo", 0.4, steps=3, **how)[0], theirs)
        for name, how in {
            "same": {"reference_sync_steps": every, "reference_mixup": mixup},
            "stays": {},
            "another mixture": {"reference_sync_steps": every, "reference_mixup": mixup - 0.3},
        }.items()
    }
    print(f"\nreference every {every} steps, {mixup}: " + ", ".join(f"{name} {x:.1e}" for name, x in ours.items()))
    assert ours["same"] <= TOLERANCE
    assert ours["stays"] > BROKEN and ours["another mixture"] > BROKEN
