"""fp8rl inside veRL 0.9.1: losses, correction, denominators, and FP8 weight sync.

Installed beside veRL it is found through the entry point group `verl.plugins` (`plugin.py`);
`VERL_USE_EXTERNAL_PLUGINS=none` leaves it out. Configured in veRL's own keys:

    actor_rollout_ref.actor.policy_loss.loss_mode      fp8rl_ppo_clip, ...        losses.py
    algorithm.rollout_correction.*                     as veRL documents them     correction.py
    actor_rollout_ref.rollout.checkpoint_engine.*      backend=fp8rl              settings.py

What of veRL is touched, and where: `plugin.py` names every place.
"""
