"""Small mistakes, each with the tests that must see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One mistake: `new` in place of `old`, which stands once in the file.

    A mistake that no test can see says in `explained` why.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    explained: str = ""


def mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """Make a mutant of a file of the package; tests are written `file::test`."""
    nodes = tuple(f"tests/test_{test.replace('::', '.py::test_', 1)}" for test in tests)
    nodes = tuple(n if "::" in n else f"{n}.py" for n in nodes)
    return Mutant(name, f"fisherlab/{file}", old, new, nodes)


OPERATORS = [
    mutant(
        "a column factor is transposed in products",
        "operators/eigenform.py",
        "back = [None if basis is None else basis.T for basis in self.bases]",
        "back = [None if basis is None else basis for basis in self.bases]",
        "operators::products_are_those_of_the_matrix",
    ),
    mutant(
        "the factors of a Kronecker product change places",
        "operators/kronecker.py",
        "out += kron(rows, cols)",
        "out += kron(cols, rows)",
        "operators::it_is_the_matrix_of_its_definition",
        "operators::products_are_those_of_the_matrix",
    ),
    mutant(
        "a panel of an inverse is not mirrored",
        "numerics/linalg.py",
        "        found[..., :start, start:end] = rows[..., :start].mT\n",
        "",
        "numerics::inverses_of_roots_go_panel_by_panel",
    ),
    mutant(
        "the trace of a sum adds the traces of its factors",
        "operators/kronecker.py",
        "float(rows.trace()) * float(cols.trace())",
        "float(rows.trace()) + float(cols.trace())",
        "operators::it_is_the_matrix_of_its_definition",
    ),
    mutant(
        "Tikhonov damping enters each factor whole",
        "operators/kronecker.py",
        "rows = torch.eye(o, dtype=self.dtype, device=self.device) * shift**0.5",
        "rows = torch.eye(o, dtype=self.dtype, device=self.device) * shift",
        "inverses::tikhonov_inverts_the_sum_plus_lambda",
    ),
    mutant(
        "π is the ratio the other way round",
        "operators/dampings.py",
        "return (col_mean / row_mean) ** 0.5 if positive else 1.0",
        "return (row_mean / col_mean) ** 0.5 if positive else 1.0",
        "inverses::pi_minimises_the_trace_norm_of_the_error_it_makes",
    ),
    mutant(
        "π is not 1 where a trace vanishes",
        "operators/dampings.py",
        "return (col_mean / row_mean) ** 0.5 if positive else 1.0",
        "return (col_mean / row_mean) ** 0.5 if positive else 2.0",
        "inverses::pi_is_one_where_a_trace_vanishes",
    ),
    mutant(
        "both factors are shifted by the same number",
        "operators/dampings.py",
        "return shifted(rows, root / ratio), shifted(cols, root * ratio)",
        "return shifted(rows, root * ratio), shifted(cols, root * ratio)",
        "inverses::pi_minimises_the_trace_norm_of_the_error_it_makes",
        "natural_gradient::factored_damping_shifts_both_factors",
    ),
    mutant(
        "a diagonal is inverted without its damping",
        "operators/eigenform.py",
        "shifted = values + damping",
        "shifted = values + 0 * damping",
        "operators::damped_solves_are_those_of_the_matrix",
    ),
    mutant(
        "the norm of a diagonal is its sum",
        "operators/eigenform.py",
        "inside = float(torch.linalg.vector_norm(self.values, dtype=torch.float64))",
        "inside = float(self.values.abs().sum(dtype=torch.float64))",
        "operators::it_is_the_matrix_of_its_definition",
    ),
    mutant(
        "shared blocks count once in the trace",
        "operators/mini_blocks.py",
        "times * float(blocks.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))",
        "float(blocks.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))",
        "mini_blocks::shared_blocks_have_the_inner_products_of_their_matrices",
        "operators::it_is_the_matrix_of_its_definition",
    ),
    mutant(
        "shared blocks count once in the norm",
        "operators/mini_blocks.py",
        "total += times * float(norm) ** 2",
        "total += float(norm) ** 2",
        "mini_blocks::shared_blocks_have_the_inner_products_of_their_matrices",
        "operators::it_is_the_matrix_of_its_definition",
    ),
    mutant(
        "the inner product of two eigenbases takes no squares",
        "operators/eigenform.py",
        "squares = [None if turn is None else turn.square() for turn in turns]",
        "squares = [None if turn is None else turn.abs() for turn in turns]",
        "operators::inner_products_with_every_operator",
    ),
    mutant(
        "the exact block forgets the number of examples in an inner product",
        "operators/factored.py",
        "return total / a.count + (b.rest * a.trace() if b.rest else 0.0)",
        "return total + (b.rest * a.trace() if b.rest else 0.0)",
        "operators::inner_products_with_every_operator",
    ),
    mutant(
        "a request that fits its budget exactly is refused",
        "numerics/memory.py",
        "if needed > budget:",
        "if needed >= budget:",
        "numerics::a_request_above_the_budget_names_both",
    ),
    mutant(
        "a chunk may be larger than asked for",
        "numerics/memory.py",
        "yield slice(start, min(start + size, total))",
        "yield slice(start, min(start + size + 1, total))",
        "numerics::chunks_cover_a_range_in_order",
    ),
    mutant(
        "Lanczos restarts from the machine's noise",
        "numerics/krylov.py",
        'options["rng"] = np.random.default_rng(0)',
        'options["rng"] = None',
        "generators::lanczos_restarts_from_fixed_noise",
    ),
]

APPROXIMATORS = [
    mutant(
        "KFAC forgets to divide by the positions",
        "approximators/kronecker/kfac.py",
        'scale = state.count / split**2 if sharing == "reduce" else 1 / split',
        'scale = state.count / split**2 if sharing == "reduce" else 1 / state.count',
        "approximators::kfac_is_its_definition_by_loops",
    ),
    mutant(
        "KFAC reduce averages over positions once",
        "approximators/kronecker/kfac.py",
        'scale = state.count / split**2 if sharing == "reduce" else 1 / split',
        "scale = 1 / split",
        "approximators::kfac_reduce_sums_inputs_and_averages_gradients",
    ),
    mutant(
        "KFAC divides neither factor by the examples",
        "approximators/kronecker/kfac.py",
        "return rows * scale, cols / state.count",
        "return rows * scale, cols",
        "approximators::every_example_twice_changes_nothing",
    ),
    mutant(
        "further columns bring their inputs again",
        "approximators/kronecker/kfac.py",
        "inputs = inputs if statistics.count else inputs[:0]",
        "inputs = inputs if statistics.count >= 0 else inputs[:0]",
        "approximators::pieces_of_examples_and_columns_add_up_to_the_whole",
    ),
    mutant(
        "TKFAC divides one factor by the trace, the other by nothing",
        "approximators/kronecker/partial_traces.py",
        "return rows / root, cols / root, trace",
        "return rows / root, cols, trace",
        "approximators::tkfac_keeps_the_partial_traces",
    ),
    mutant(
        "Shampoo takes the factors in place of their roots",
        "approximators/kronecker/partial_traces.py",
        "return (vectors * values.clamp_min(0).sqrt()) @ vectors.T",
        "return (vectors * values.clamp_min(0)) @ vectors.T",
        "kronecker_family::shampoo_is_the_root_of_the_partial_traces_and_bounds_the_block",
    ),
    mutant(
        "what lies outside of a span is forgotten",
        "numerics/decompositions.py",
        "if float(outside) >",
        "if 1e-12 * float(outside) >",
        "decompositions::what_acts_outside_of_the_span_is_decomposed_whole",
    ),
    mutant(
        "every method decomposes the factors anew",
        "numerics/decompositions.py",
        "if key not in self.known:",
        "if key:",
        "decompositions::one_decomposition_a_factor_serves_every_method",
    ),
    mutant(
        "tables of positions sum one column alone",
        "numerics/tables.py",
        "return found.view(v, n, t, t).sum(0).flatten()",
        "return found.view(v, n, t, t)[0].flatten()",
        "position_gram::pairs_are_those_of_the_whole_rearrangement",
    ),
    mutant(
        "SOAP takes the traces of the rows for those of the columns",
        "approximators/kronecker/eigenvalues.py",
        "rows, cols, _ = traced(state)",
        "cols, rows, _ = traced(state)",
        "shampoo_relatives::soap_is_the_best_diagonal_in_shampoos_basis",
    ),
    mutant(
        "KL-Shampoo whitens by a factor in place of its inverse",
        "approximators/kronecker/kl_shampoo.py",
        "return _shifted(self.block.apply(inverse), shift) / len(cols)",
        "return _shifted(self.block.apply(cols), shift) / len(cols)",
        "shampoo_relatives::no_kronecker_product_has_a_smaller_divergence",
    ),
    mutant(
        "Muon takes the partial trace in place of its root",
        "approximators/kronecker/partial_traces.py",
        'rows = _root(state.tensors[0] / state.count, f"the factor of {made}")',
        "rows = state.tensors[0] / state.count",
        "shampoo_relatives::muon_is_the_root_of_one_partial_trace",
    ),
    mutant(
        "Muon's preconditioner forgets its momentum",
        "approximators/gradient_roots.py",
        "total = total + self.momentum * previous.gradient",
        "total = total + 0 * previous.gradient",
        "shampoo_relatives::a_momentum_goes_on_from_the_operator_before",
    ),
    mutant(
        "KL-Shampoo's recursion whitens with the new factor",
        "operators/gradient_roots.py",
        "whitened(new.gradient, self.cols, new.ridge)",
        "whitened(new.gradient, new.cols, new.ridge)",
        "shampoo_relatives::kl_shampoos_average_is_its_published_recursion",
    ),
    mutant(
        "SOAP adds the square in the old basis",
        "operators/gradient_roots.py",
        "fresh = (left.T @ new.gradient @ right).square()",
        "fresh = (self.row_basis.T @ new.gradient @ right).square()",
        "shampoo_relatives::soaps_average_is_its_published_recursion",
    ),
    mutant(
        "the diagonal is a sum, not a mean",
        "approximators/blocks/mini_block.py",
        "return operators.Diagonal(state.tensors[0] / state.count, made)",
        "return operators.Diagonal(state.tensors[0], made)",
        "approximators::the_exact_block_and_its_diagonal",
    ),
    mutant(
        "a correction is thrown away that is above rounding",
        "approximators/kpsvd/kfac_corrected.py",
        "return float(found.values[0]) > 1e2 * eps * kfac.frobenius_norm()",
        "return float(found.values[0]) > 1e12 * eps * kfac.frobenius_norm()",
        "kpsvd::a_small_correction_above_rounding_is_kept",
    ),
    mutant(
        "averages of later pairs do not align their signs",
        "approximators/averages.py",
        "torch.where(rows + cols >= 0, 1.0, -1.0)",
        "torch.where(rows + cols >= -1e300, 1.0, -1.0)",
        "kronecker_family::the_average_of_kronecker_sums_is_factor_wise_with_signs_aligned",
    ),
    mutant(
        "an average weighs the new operator with the share of the old",
        "approximators/averages.py",
        "return Diagonal(weight * old.entries + (1 - weight) * new.entries, "
        "new.provenance)",
        "return Diagonal((1 - weight) * old.entries + weight * new.entries, "
        "new.provenance)",
        "kronecker_family::plain_averages_are_averages_of_the_matrices",
    ),
    mutant(
        "a pair that vanishes does not fade",
        "approximators/averages.py",
        "faded = [(weight * g, weight * a) for g, a in old.terms[len(fresh) :]]",
        "faded = [(g, a) for g, a in old.terms[len(fresh) :]]",
        "kronecker_family::a_pair_that_appears_or_vanishes_is_kept_or_fades",
    ),
    mutant(
        "the average of eigen forms mixes the old entries without turning them",
        "approximators/averages.py",
        "kept = rows @ old.entries @ cols.T  # the diagonal of the old matrix in the new "
        "basis",
        "kept = old.entries",
        "kronecker_family::the_average_of_eigen_forms_is_the_best_diagonal_in_the_new_basis",
    ),
]

METRICS = [
    mutant(
        "γ has the sign of the slope",
        "metrics/directions.py",
        "return max(curvature, 0.0) ** 0.5 / abs(slope)",
        "return max(curvature, 0.0) ** 0.5 / slope",
        "metric_structure::gamma_is_positive_for_steps_up_and_down",
    ),
    mutant(
        "γ of a direction orthogonal to the gradient is no number",
        "metrics/directions.py",
        'return float("inf") if curvature > 0 else float("nan")',
        'return float("nan")',
        "metric_structure::gamma_is_positive_for_steps_up_and_down",
    ),
    mutant(
        "a decrease ratio is never below 0",
        "metrics/directions.py",
        'return reached / best if best > 0 else float("nan")',
        'return max(reached, 0.0) / best if best > 0 else float("nan")',
        "metric_structure::a_step_that_is_too_long_has_a_negative_decrease",
    ),
    mutant(
        "the decrease counts the curvature whole",
        "metrics/directions.py",
        "reached = _dot(step.gradient, step.taken) - step.curvature / 2",
        "reached = _dot(step.gradient, step.taken) - step.curvature",
        "metric_laws::metrics_of_damped_matrices_are_their_definitions",
    ),
    mutant(
        "the squared cosine is not squared",
        "metrics/directions.py",
        'return slope**2 / sizes if sizes > 0 else float("nan")',
        'return abs(slope) / sizes if sizes > 0 else float("nan")',
        "metric_laws::metrics_of_damped_matrices_are_their_definitions",
    ),
    mutant(
        "the best scale divides by the norm, not its square",
        "metrics/frobenius.py",
        "size = pair.approx_norm**2",
        "size = pair.approx_norm",
        "metric_laws::metrics_of_matrices_are_their_definitions",
    ),
    mutant(
        "the trace ratio the other way round",
        "metrics/frobenius.py",
        'return pair.approx.trace() / trace if trace else float("nan")',
        'return trace / pair.approx.trace() if trace else float("nan")',
        "metric_laws::metrics_of_matrices_are_their_definitions",
    ),
    mutant(
        "a correlation without means",
        "metrics/frobenius.py",
        "moved = diagonal - diagonal.mean()",
        "moved = diagonal - 0 * diagonal.mean()",
        "metric_laws::metrics_of_matrices_are_their_definitions",
    ),
    mutant(
        "a divergence keeps the two determinants for both ways",
        "metrics/divergences.py",
        "mine, other = other, mine",
        "mine, other = mine, other",
        "metric_laws::metrics_of_damped_matrices_are_their_definitions",
    ),
    mutant(
        "a divergence without its half",
        "metrics/divergences.py",
        "return found / 2\n",
        "return found\n",
        "metric_laws::metrics_of_damped_matrices_are_their_definitions",
    ),
    mutant(
        "couplings are not divided by the examples twice",
        "metrics/structure.py",
        "return total / layers[0].count ** 2",
        "return total / layers[0].count",
        "metric_structure::couplings_are_norms_of_the_blocks_between_layers",
    ),
]

STATISTICS = [
    mutant(
        "the transpose of a weight passes for the weight",
        "statistics/recorder.py",
        "turned=reading.flipped != place.turned",
        "turned=reading.flipped",
        "uses::every_block_is_the_brute_force_fisher",
        "uses::a_bare_product_has_the_samples_of_its_twin",
    ),
    mutant(
        "a use without the bias counts it",
        "layers/uses.py",
        "return _with_last_column(found, float(self.ones), self.form.groups)",
        "return _with_last_column(found, 1.0, self.form.groups)",
        "uses::kfac_is_its_definition_with_every_use_written_out",
    ),
    mutant(
        "KFAC of a turned weight has its factors the wrong way round",
        "approximators/kronecker/kfac.py",
        "        factors_ = factors_[::-1]",
        "        factors_ = factors_[::1]",
        "uses::kfac_is_its_definition_with_every_use_written_out",
    ),
    mutant(
        "labels of a language model stay where they are",
        "layers/hugging_face.py",
        "labels = torch.cat([labels[:, 1:], last], 1)",
        "labels = torch.cat([labels[:, :-1], last], 1)",
        "hugging_face::the_loss_is_that_of_the_model",
    ),
    mutant(
        "inner products of a tied table count its uses apart",
        "samples/summed.py",
        "return table.gram() + pair.gram() + crossed + crossed.T",
        "return table.gram() + pair.gram()",
        "uses::a_tied_table_forms_no_matrix_of_its_size",
    ),
    mutant(
        "a later use goes unnoticed",
        "statistics/collect.py",
        "if fits and name not in done.unseen and left.isdisjoint(block.parameters):",
        "if fits and name not in done.unseen:",
        "uses::a_use_that_only_later_examples_reach_is_refused",
    ),
    mutant(
        "uses of different kinds take turns in their columns",
        "statistics/gathered.py",
        "join = partial(join_columns, compressed=False)",
        "join = join_columns",
        "uses::every_block_is_the_brute_force_fisher",
    ),
    mutant(
        "determinism is checked in the first batch alone",
        "statistics/collect.py",
        "checked = check_deterministic and number < 2",
        "checked = check_deterministic and number < 1",
        "determinism::noise_that_begins_in_the_second_batch_is_found",
    ),
    mutant(
        "determinism lets any difference through",
        "statistics/gathered.py",
        "if difference > allowed:",
        "if difference > 1e6 * allowed:",
        "determinism::the_layer_behind_the_noise_is_named",
    ),
    mutant(
        "chunk_size is not heeded in shared form",
        "statistics/collect.py",
        "for part in chunks(len(batch), job.chunk_size or run_length(found, job.budget)):",
        "for part in chunks(len(batch), run_length(found, job.budget)):",
        "statistics::a_chunk_is_never_larger_than_asked_for",
    ),
    mutant(
        "chunk_size 0 is taken for the default",
        "statistics/collect.py",
        "if chunk_size is not None and chunk_size < 1:",
        "if chunk_size is not None and chunk_size < 0:",
        "statistics::a_chunk_is_never_larger_than_asked_for",
    ),
    mutant(
        "draws depend on the place in the batch",
        "statistics/fishers.py",
        "bits = np.random.Philox(key=key).advance(first * steps)",
        "bits = np.random.Philox(key=key).advance(0 * first * steps)",
        "statistics::sampled_labels_depend_on_the_index_of_the_example_alone",
    ),
    mutant(
        "every step draws the same labels",
        "statistics/fishers.py",
        "stream=(self.step << 20) + draw,",
        "stream=draw,",
        "likelihoods::every_step_draws_labels_of_its_own",
    ),
    mutant(
        "several draws weigh too much",
        "statistics/fishers.py",
        "columns = torch.stack(drawn) / self.samples**0.5",
        "columns = torch.stack(drawn)",
        "likelihoods::monte_carlo_columns_are_weighted_gradients_at_drawn_labels",
    ),
    mutant(
        "sampled columns forget the mask",
        "statistics/fishers.py",
        "return columns if mask is None else columns * mask",
        "return columns",
        "likelihoods::masked_outputs_vanish_from_every_column",
    ),
    mutant(
        "padding of an embedding is row 0",
        "statistics/gathered.py",
        "tokens = [_grow(p.tokens, 1, length, value=-1) for p in pieces]",
        "tokens = [_grow(p.tokens, 1, length, value=0) for p in pieces]",
        "embeddings_and_groups::padding_to_the_longest_changes_nothing",
    ),
    mutant(
        "the Gaussian loss without its half",
        "likelihoods.py",
        "return _sum_known(each, target) / (2 * self.variance)",
        "return _sum_known(each, target) / self.variance",
        "likelihoods::the_loss_is_torchs_own_summed_over_outputs",
    ),
    mutant(
        "the Gaussian root has the variance for the deviation",
        "likelihoods.py",
        "deviation = torch.full_like(output, self.variance**-0.5)",
        "deviation = torch.full_like(output, self.variance**-1)",
        "likelihoods::the_root_squared_is_the_output_fisher",
    ),
    mutant(
        "the Bernoulli root without its root",
        "likelihoods.py",
        "deviation = (output.sigmoid() * (-output).sigmoid()).sqrt()",
        "deviation = output.sigmoid() * (-output).sigmoid()",
        "likelihoods::the_root_squared_is_the_output_fisher",
    ),
    mutant(
        "a bias of another size joins the weight",
        "layers/blocks.py",
        "if other is not None and other.numel() == rows:",
        "if other is not None and other.numel() >= 1:",
        "statistics::a_bias_of_another_length_is_a_block_of_its_own",
    ),
]

TRAINING = [
    mutant(
        "a direction clip sums before it takes the size",
        "training/moves.py",
        "total = inner.abs().sum() + _FLOOR",
        "total = inner.sum().abs() + _FLOOR",
        "natural_gradient::products_of_both_signs_do_not_cancel_in_a_clip",
    ),
    mutant(
        "a step clip takes the rate once",
        "training/moves.py",
        "[rate**2 * product for rate, product in pairs]",
        "[rate * product for rate, product in pairs]",
        "natural_gradient::clipping_holds_the_estimated_divergence_at_its_bound",
    ),
    mutant(
        "a clip lengthens short steps",
        "training/moves.py",
        "return ratio.sqrt().clamp_max(1)",
        "return ratio.sqrt()",
        "natural_gradient::clipping_holds_the_estimated_divergence_at_its_bound",
    ),
    mutant(
        "a ratio that is no number leaves the damping",
        "training/levenberg_marquardt.py",
        "if ratio < self.low or math.isnan(ratio):",
        "if ratio < self.low:",
        "full_kfac::lambda_follows_the_reduction_ratio",
    ),
    mutant(
        "a ratio below 0 counts as a good one",
        "training/levenberg_marquardt.py",
        "if ratio > self.high:",
        "if abs(ratio) > self.high:",
        "full_kfac::lambda_follows_the_reduction_ratio",
    ),
    mutant(
        "the damping falls below its floor",
        "training/levenberg_marquardt.py",
        "return max(omega * damping, self.floor)",
        "return omega * damping",
        "full_kfac::lambda_follows_the_reduction_ratio",
    ),
    mutant(
        "averages are not corrected for their start",
        "training/averaging.py",
        "return self.decay * (1 - self.decay**updates) / (1 - self.decay ** (updates + 1))",
        "return self.decay if updates else 0.0",
        "natural_gradient_state",
    ),
    mutant(
        "weight decay is not scaled by the rate",
        "training/moves.py",
        '_factor(good, 1 - rate * group["weight_decay"])',
        '_factor(good, 1 - group["weight_decay"])',
        "natural_gradient::weight_decay_is_apart_from_the_gradient",
    ),
    mutant(
        "momentum weighs the new direction",
        "training/moves.py",
        'state["momentum"].mul_(momentum).add_(step)',
        'state["momentum"].mul_(momentum).add_(step, alpha=1 - momentum)',
        "natural_gradient::momentum_adds_up_directions_or_gradients",
    ),
    mutant(
        "a momentum of 1 is let through",
        "training/moves.py",
        'if found.get("momentum", 0) >= 1:',
        'if found.get("momentum", 0) > 1:',
        "natural_gradient::settings_out_of_range_are_refused_at_once",
    ),
    mutant(
        "tune takes a loss that is no number",
        "training/studies.py",
        "return value if math.isfinite(value) else math.inf",
        "return value",
        "tune::an_objective_that_is_no_number_is_never_the_best",
    ),
]

ANALYSIS = [
    mutant(
        "files are renamed before they are on the disk",
        "durable.py",
        "        flush(scratch)\n",
        "",
        "follow::a_file_is_on_the_disk_before_it_gets_its_name",
    ),
    mutant(
        "the name of a new file is not on the disk",
        "durable.py",
        "        flush(path.parent)\n",
        "",
        "follow::a_file_is_on_the_disk_before_it_gets_its_name",
    ),
    mutant(
        "a write that breaks off leaves its scratch file",
        "durable.py",
        "        scratch.unlink(missing_ok=True)\n",
        "        pass\n",
        "follow::a_write_that_breaks_off_leaves_the_old_file",
    ),
    mutant(
        "relative damping is a share of the trace",
        "operators/dampings.py",
        "mean = operator.trace() / max(operator.shape[0], 1)",
        "mean = operator.trace()",
        "analysis::relative_damping_is_a_fraction_of_the_mean_eigenvalue",
    ),
    mutant(
        "a damping of 0 is let through",
        "analysis/damping.py",
        "if not found or any(not _size(one) > 0 for one in found):",
        "if not found or any(not _size(one) >= 0 for one in found):",
        "analysis::questions_that_cannot_be_answered_are_refused",
    ),
    mutant(
        "intervals are of one value, not of the mean",
        "analysis/intervals.py",
        "return middle, factor * spread / count**0.5",
        "return middle, factor * spread",
        "analysis_depth::intervals_are_students",
    ),
    mutant(
        "intervals have one tail",
        "analysis/intervals.py",
        "factor = float(stdtrit(count - 1, (1 + level) / 2))",
        "factor = float(stdtrit(count - 1, level))",
        "analysis_depth::intervals_are_students",
    ),
    mutant(
        "two entries that are equal beat each other",
        "analysis/pareto_front.py",
        "beaten = (no_worse & better).any(twin)",
        "beaten = (no_worse | better).any(twin)",
        "analysis_depth::a_front_is_what_nothing_else_beats",
    ),
    mutant(
        "labels of stacked runs may repeat",
        "analysis/merging.py",
        "if len(set(known.tolist())) != len(known):",
        "if not len(known):",
        "analysis_files",
    ),
    mutant(
        "runs of two likelihoods are merged",
        "analysis/merging.py",
        '    "likelihood",\n    "conventions",',
        '    "conventions",',
        "analysis_files::conflicts_are_refused_by_name",
    ),
    mutant(
        "masked labels count in accuracies",
        "training/loop.py",
        "labels += int((y != likelihood.ignore_index).sum())",
        "labels += y.numel()",
        "training::masked_positions_count_in_no_accuracy",
    ),
    mutant(
        "the rate of a report is that of one label",
        "report/analysis.py",
        "return _RATE * len(labels) / max(labels.numel(), 1)",
        "return _RATE",
        "report_job::the_default_rate_is_that_of_the_mean_over_labels",
    ),
    mutant(
        "matrices are formed where they do not fit",
        "samples/shared.py",
        "if not fit or by_pairs < samples * o * i * (o + i):",
        "if by_pairs < samples * o * i * (o + i):",
        "samples::matrices_are_formed_once_where_that_is_cheaper_and_fits",
    ),
]

PURPOSES = [
    mutant(
        "a step is judged by half of its curvature",
        "purposes/step.py",
        "float(2 * slopes[0] - curvatures[0]) / goal",
        "float(2 * slopes[0] - curvatures[0] / 2) / goal",
        "purposes::steps_are_those_of_formed_matrices",
    ),
    mutant(
        "the divergences of posteriors change places",
        "purposes/laplace.py",
        "            kl=lambda: backward(damped),",
        "            kl=lambda: forward(damped),",
        "purposes::posteriors_are_those_of_formed_matrices",
    ),
    mutant(
        "a posterior forgets the number of data",
        "purposes/laplace.py",
        "return torch.cat(parts, 1) / self.data_size",
        "return torch.cat(parts, 1)",
        "purposes::posteriors_are_those_of_formed_matrices",
    ),
    mutant(
        "the weights of largest saliency are pruned",
        "purposes/weights.py",
        "saliency.argsort()[:count]",
        "saliency.argsort(descending=True)[:count]",
        "purposes::saliencies_are_those_of_formed_matrices",
    ),
    mutant(
        "a verdict ranks the farthest first",
        "analysis/verdicts.py",
        "found.sort(key=lambda j: abs(self.pooled[j] - self.best))",
        "found.sort(key=lambda j: -abs(self.pooled[j] - self.best))",
        "verdicts::no_sentence_is_false_whatever_the_numbers",
    ),
]

RANKS = [
    mutant(
        "each rank counts its examples from zero",
        "numerics/ranks.py",
        "return sum(self.gathered(count)[: self.rank])",
        "return 0 * sum(self.gathered(count))",
        "ranks::two_ranks_train_as_one",
    ),
    mutant(
        "ranks weigh alike whatever their examples",
        "training/replicas.py",
        "share = counts[ranks.rank] / sum(counts)",
        "share = 1 / ranks.size",
        "ranks::two_ranks_train_as_one",
    ),
    mutant(
        "sums of other ranks are left out",
        "numerics/ranks.py",
        "            distributed.all_reduce(total, group=self.group)",
        "            pass",
        "ranks::two_ranks_train_as_one",
    ),
    mutant(
        "a block named as the unit of networks stands for its method",
        "approximators/streaming.py",
        "operators[NETWORK] if facts(self.chosen[name]).couples else operators",
        "operators.get(NETWORK, operators)",
        "register::a_layer_may_be_called_as_methods_of_networks_call_their_unit",
    ),
    mutant(
        "counting forms an inverse",
        "operators/dense.py",
        '"""p²: two triangular solves."""\n        return self.shape[0] ** 2',
        '"""p²: two triangular solves."""\n        return self.formed.product_flops',
        "operators::counting_computes_nothing",
    ),
    mutant(
        "all moments of a report have the same time",
        "report/sizes.py",
        "return [*[seconds / 2 / others] * others, seconds / 2]",
        "return [seconds / moments] * moments",
        "report_job::the_last_moment_has_as_much_time_as_all_before_it",
    ),
]

EVERY = [
    *OPERATORS,
    *APPROXIMATORS,
    *METRICS,
    *STATISTICS,
    *TRAINING,
    *ANALYSIS,
    *PURPOSES,
    *RANKS,
]
