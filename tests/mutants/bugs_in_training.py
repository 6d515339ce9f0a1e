"""Seeded bugs in a client's local work, alone and in a cohort."""

from __future__ import annotations

from mutant import Mutant

TRAINING = [
    Mutant(
        "the parts of a batch count alike",
        "client/batching.py",
        "loss = loss * (count / sum(counts))",
        "loss = loss / len(parts)",
        "tests/client/test_memory_savings.py::test_a_batch_in_parts_is_the_batch",
    ),
    Mutant(
        "clients of several runs have one seed",
        "client/training.py",
        "replace(settings, seed=self.terms.seed, local=self.terms.local)",
        "replace(settings, local=self.terms.local)",
        "tests/client/test_cohort.py::test_clients_of_several_runs_share_a_pass tests/runs/test_many.py",
    ),
    Mutant(
        "HetLoRA: the tail's norm is not in the loss",
        "client/training.py",
        "torch.autograd.backward(strength * model.tail_penalty(tail))",
        "torch.autograd.backward(0 * strength * model.tail_penalty(tail))",
        "tests/client/test_training.py::test_the_tail_penalty_shrinks_the_tail",
    ),
    Mutant(
        "a round's gradient is the sum over its batches, not the mean",
        "client/training.py",
        "add_gradients(model, parts, settings.engine, 1 / steps)",
        "add_gradients(model, parts, settings.engine)",
        "tests/client/test_local_rules.py",
    ),
    Mutant(
        "the gradient's loss is the sum over its batches",
        "client/training.py",
        "LocalResult(update, float(total) / steps, steps)",
        "LocalResult(update, float(total), steps)",
        "tests/client/test_local_rules.py",
    ),
    Mutant(
        "gradients are clipped before the proximal term",
        "client/training.py",
        "                    p.grad.add_(p - self.start[name], alpha=self.mu)",
        "                    p.grad.mul_(min(1.0, 1.0 / float(p.grad.norm() + 1e-6)))\n"
        "                    p.grad.add_(p - self.start[name], alpha=self.mu)",
        "tests/client/test_local_rules.py",
    ),
    Mutant(
        "FedProx pulls towards 0",
        "client/training.py",
        "p.grad.add_(p - self.start[name], alpha=self.mu)",
        "p.grad.add_(p, alpha=self.mu)",
        "tests/client/test_local_rules.py",
    ),
    Mutant(
        "SCAFFOLD's correction is clipped with the gradients",
        "client/training.py",
        "            trained.gradients()\n            if local.clip_norm is not None:",
        "            trained.gradients()\n            trained.correct()\n            if local.clip_norm is not None:",
        "tests/client/test_local_rules.py tests/methods/test_client_rules.py",
    ),
    Mutant(
        "warm-up starts at rate 0",
        "client/learning_rates.py",
        "min(1.0, (step + 1) / warmup)",
        "min(1.0, step / warmup)",
        "tests/client/test_training.py::test_the_learning_rate_rises_linearly_over_the_warmup",
    ),
    Mutant(
        "batches repeat examples within a pass",
        "client/batching.py",
        "        order = order[size:]",
        "        order = order[size - 1 :] if size > 1 else order[size:]",
        "tests/client/test_training.py::test_batches_go_through_the_data_without_replacement",
    ),
    Mutant(
        "Ravan: scales do not reach the gradients of the cores",
        "client/head_cores.py",
        "self.matrices.grad = grad * self.scales[self.head][:, None]",
        "self.matrices.grad = grad",
        "tests/methods/test_client_rules.py::test_ravan_trains_the_cores_and_their_scales",
    ),
    Mutant(
        "Ravan: a scale learns from the core that was sent",
        "client/head_cores.py",
        "inner = (grad * self.matrices).sum(dim=1)",
        "inner = (grad * self.start).sum(dim=1)",
        "tests/methods/test_client_rules.py::test_ravan_trains_the_cores_and_their_scales",
    ),
    Mutant(
        "FedAdamW: the movement ignores the schedule",
        "client/training.py",
        "trained.drift(now / planned)",
        "trained.drift(1 / work.steps)",
        "tests/methods/test_client_rules.py::test_fedadamw_clients_take_the_steps_of_the_paper",
    ),
    Mutant(
        "a kept optimizer's state is changed in place",
        "client/optimizer_state.py",
        "parameter.device, copy=True)",
        "parameter.device)",
        "tests/client/test_kept_optimizer.py::test_an_answer_that_was_not_counted_leaves_the_kept_state_alone "
        "tests/client/test_kept_optimizer.py::test_a_state_is_put_back_where_it_was",
    ),
    Mutant(
        "a kept optimizer forgets what was not trained",
        "methods/kept_optimizer.py",
        "held = {**before, **update.optimizer}",
        "held = update.optimizer",
        "tests/client/test_kept_optimizer.py::test_the_methods_own_state_and_the_optimizers_do_not_meet",
    ),
    Mutant(
        "a kept optimizer's state leaves the site",
        "methods/kept_optimizer.py",
        "method.encode(replace(update, optimizer={}), sent, own)",
        "method.encode(update, sent, own)",
        "tests/client/test_kept_optimizer.py::test_the_state_stays_on_the_site",
    ),
    Mutant(
        "epochs drop the last batch",
        "client/training.py",
        "config.epochs * math.ceil(num_examples / config.batch_size)",
        "config.epochs * max(1, num_examples // config.batch_size)",
        "tests/client/test_training.py::test_steps_and_epochs",
    ),
    Mutant(
        "the training loss is a sum",
        "client/training.py",
        "LocalResult(update, float(total) / work.steps, work.steps, _state_bytes(optimizer))",
        "LocalResult(update, float(total), work.steps, _state_bytes(optimizer))",
        "tests/client/test_cohort.py::test_together_is_alone_whatever_the_clients_differ_in",
    ),
    Mutant(
        "moments start from zero where they are sent",
        "client/training.py",
        "adamw.start_from(stepped[name], moment.to(stepped[name]).expand(stepped[name].shape))",
        "pass",
        "tests/methods/test_client_rules.py::test_fedadamw_clients_take_the_steps_of_the_paper",
    ),
    Mutant(
        "confined tensors move twice as far as their coordinates",
        "client/training.py",
        "self.chosen[name].copy_(self.start[name] + space.expand(moved))",
        "self.chosen[name].copy_(self.start[name] + 2 * space.expand(moved))",
        "tests/methods/test_client_rules.py::test_ravan_trains_the_cores_and_their_scales",
    ),
    Mutant(
        "in a cohort small gradients are scaled up to the clip",
        "client/passes.py",
        "(clip_norm / (norms + 1e-6)).clamp_(max=1.0)",
        "(clip_norm / (norms + 1e-6))",
        "tests/client/test_cohort.py::test_together_is_alone_for_every_kind_of_task "
        "tests/client/test_cohort.py::test_together_is_alone_whatever_the_clients_differ_in",
    ),
    Mutant(
        "in a cohort all follow the longest schedule",
        "client/cohort.py",
        'options["member"].rate(step)',
        "members[0].rate(step)",
        "tests/client/test_cohort.py::test_together_is_alone_for_every_kind_of_task",
    ),
    Mutant(
        "in a cohort a repeated row counts in the loss",
        "client/cohort.py",
        "client_losses(model, moved, active, real)",
        "client_losses(model, moved, active, None)",
        "tests/client/test_cohort.py::test_together_is_alone_whatever_the_clients_differ_in",
    ),
    Mutant(
        "in a cohort the penalty has no strength",
        "client/passes.py",
        "(stack.tail_penalties(tails) * strengths).sum()",
        "stack.tail_penalties(tails).sum()",
        "tests/client/test_cohort.py::test_what_the_recipe_says_holds_for_every_client",
    ),
]
