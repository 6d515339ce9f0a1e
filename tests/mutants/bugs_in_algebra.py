"""Seeded bugs in the algebra and in the approximations that servers make with it."""

from __future__ import annotations

from mutant import Mutant

ALGEBRA = [
    Mutant(
        "a tall layer's votes that tie are decided by rounding",
        "methods/tall.py",
        "safe = safe & ~close[:, first : spec.rank].any(dim=1)",
        "safe = safe & ~close[:, first : spec.rank].all(dim=1)",
        "tests/methods/test_tall.py::test_the_undecided_and_inaccurate_are_given_back",
    ),
    Mutant(
        "the probes of an estimated distance see what is measured exactly",
        "methods/distances.py",
        "probes = probes - v @ (v.mT @ probes)",
        "probes = probes - 0 * v @ (v.mT @ probes)",
        "tests/methods/test_large_layers.py::test_estimated_distances_are_unbiased_and_their_differences_exact",
    ),
    Mutant(
        "weights from inner products fit T and not what the shares leave of it",
        "methods/factor_weights.py",
        "lacking = (seen - m[..., None]) * shares",
        "lacking = seen * shares",
        "tests/methods/test_large_layers.py::test_weights_from_inner_products_are_those_from_bases",
    ),
    Mutant(
        "a stream's sum of products holds the factors of all clients",
        "methods/products.py",
        "if c * (m + n) < math.prod((m, n)):",
        "if c * (m + n) >= 0:",
        "tests/streaming/test_product_streams.py::test_a_large_stream_holds_the_matrix_and_no_more",
    ),
    Mutant(
        "a column space is taken for full where rounding may have made it so",
        "algebra/subspace.py",
        "safe = (worst_b < limit) & (worst_a < limit) & (certain > rounding)",
        "safe = (worst_b < limit) & (worst_a < limit)",
        "tests/algebra/test_subspace.py",
    ),
    Mutant(
        "ties are not broken by energy",
        "algebra/ties.py",
        "+ width * sizes)",
        "+ 0 * sizes)",
        "tests/methods/test_ties.py::test_tied_votes_see_no_gauge",
    ),
    Mutant(
        "near-ties are taken for decided",
        "algebra/ties.py",
        "(gaps < reach(eps)).any()",
        "(gaps < 1e-3 * tie_width(eps)).any()",
        "tests/methods/test_ties.py::test_tied_votes_see_no_gauge "
        "tests/methods/test_ties.py::test_the_choice_is_smooth_in_the_votes",
    ),
    Mutant(
        "an automatic rank keeps the tolerance's root",
        "methods/spectral.py",
        "allowed = spec.tolerance**2 * x.size_squared",
        "allowed = spec.tolerance * x.size_squared",
        "tests/methods/test_glora_certificates.py::test_auto_rank_keeps_the_tolerance_and_no_more",
    ),
    Mutant(
        "the Nyström step keeps what rounding made",
        "methods/spectral.py",
        "kept = values > 4 * len(values) * torch.finfo(y.dtype).eps * values.max()",
        "kept = values > 0",
        "tests/methods/test_glora_sums.py::test_narrow_sums_lose_no_more_than_their_rounding "
        "tests/methods/test_glora_sums.py::test_few_directions_give_the_state_of_glora",
    ),
    Mutant(
        "the consensus weighs projectors by squares",
        "algebra/subspace.py",
        "stacked = torch.cat([q * w**0.5 for q, w",
        "stacked = torch.cat([q * w for q, w",
        "tests/algebra/test_subspace.py::test_consensus_is_the_top_of_the_dense_projector_sum",
    ),
    Mutant(
        "the rank of a product does not know the size of its terms",
        "algebra/lowrank.py",
        "torch.maximum(s[..., :1], floor)",
        "s[..., :1]",
        "tests/algebra/test_lowrank.py::test_numerical_rank_sees_through_copies_and_gauges "
        "tests/methods/test_glora.py::test_the_server_rank_is_that_of_the_union_in_any_gauge",
    ),
    Mutant(
        "an inner product forgets a power of two",
        "algebra/lowrank.py",
        ".sum()), e + f)",
        ".sum()), e)",
        "tests/algebra/test_lowrank.py::test_inner_products_of_any_size_are_those_of_ordinary_ones",
    ),
    Mutant(
        "LDAdam's moments lose their start",
        "algebra/galore.py",
        "mass * (rotation.square()",
        "(rotation.square()",
        "tests/algebra/test_galore.py::test_projecting_moments_by_a_signed_permutation_is_exact "
        "tests/algebra/test_galore.py::test_every_step_is_the_papers_formula",
    ),
    Mutant(
        "GaLore: a reset does not make the moments young",
        "algebra/galore.py",
        'return int((done - 1) % group["update_gap"]) + 1',
        "return done",
        "tests/algebra/test_galore.py::test_every_step_is_the_papers_formula",
    ),
    Mutant(
        "GaLore: the scale is left out",
        "algebra/galore.py",
        'group["scale"] * (p @ _adam(',
        "(p @ _adam(",
        "tests/algebra/test_galore.py::test_the_scale_multiplies_the_projected_step_and_not_the_decay",
    ),
    Mutant(
        "GaLore: decay follows the step",
        "algebra/galore.py",
        '    p.mul_(1 - group["lr"] * group["weight_decay"])\n    p.sub_(direction, alpha=group["lr"])',
        '    p.sub_(direction, alpha=group["lr"])\n    p.mul_(1 - group["lr"] * group["weight_decay"])',
        "tests/algebra/test_galore.py::test_without_a_rank_it_is_adamw",
    ),
    Mutant(
        "terms that cancel are multiplied out",
        "algebra/lowrank.py",
        "return not size * CANCELS**2 < terms",
        "return True",
        "tests/methods/test_ill_gauges.py::test_terms_that_cancel_are_collected_without_losing_the_product",
    ),
    Mutant(
        "ordinary factors are re-factored",
        "algebra/lowrank.py",
        "return not size * CANCELS**2 < terms",
        "return False",
        "tests/methods/test_ill_gauges.py::test_pairs_of_ordinary_condition_keep_their_bits",
    ),
]
