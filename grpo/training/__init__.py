"""One step after its rollout: scores -> advantages -> micro-batches -> loss -> update.

In: prompts and this rank's completions. Out: an updated `Policy` and the step's metrics. In the order of a step:
scoring.py, advantages.py, minibatches.py, exchange.py, losses.py, policy.py, backends/, metrics.py. A new surrogate is
a function and its entry in surrogates.py, a new weighting an entry in losses.py, a new backend a file in backends/.
Functions of the user's own: user_surrogate.py, user_table_functions.py. draws.py chooses the groups of a step.
"""
