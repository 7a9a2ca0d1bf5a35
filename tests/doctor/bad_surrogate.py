"""A surrogate that is NaN in some minibatches, for a recording of tests/doctor."""


def sometimes_nan(logprobs, old_logprobs, ref_logprobs, sampler_logprobs, advantages, mask):
    loss = -advantages[:, None] * (logprobs - old_logprobs).exp()
    broken = mask.shape[0] > 2 and int(mask.sum()) % 3 == 0
    return loss * (float("nan") if broken else 1.0), {}
