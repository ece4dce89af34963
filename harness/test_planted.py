"""Each mistake is put into a source file, and a test of test_all.py, or of harness/test_harness.py,
must notice, by an assertion.

    python harness/test_planted.py                 # under a minute on one CPU core
"""
import itertools
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# From the repository:
import ddpm                                                                    # noqa: E402
import reward                                                                  # noqa: E402
import rl_distill as rl                                                        # noqa: E402
import sample                                                                  # noqa: E402
import student                                                                 # noqa: E402
import teacher                                                                 # noqa: E402
import test_all                                                                # noqa: E402
from harness import checkpoints, test_harness                                  # noqa: E402

MODULES = [*test_all.MODULES, checkpoints, test_all, test_harness]
PLANTED = [  # (module, what the source says, the mistake, the test that notices)
    (ddpm, "torch.ones(1, dtype=torch.float64), ", "", "Jump.test_alpha_bar_equals_the_loop"),
    (ddpm, "* x0 + (1 - ab)", "* x0 - (1 - ab)", "Jump.test_q_sample_is_eq_4"),
    (ddpm, "x_t + ab.sqrt() * v", "x_t - ab.sqrt() * v", "Jump.test_x0_and_eps_explain_x_t"),
    (ddpm, "(eps_hat, eps)", "(eps_hat, eps, reduction='sum')", "Jump.test_simple_loss_is_a_mean"),
    (ddpm, " / ab_next).sqrt()", ").sqrt()", "Jump.test_it_is_eq_12_with_the_sigma_of_eq_16"),
    (ddpm, " - expand_like(sigma, x_t) ** 2)", ")",
     "Jump.test_eta_1_one_step_apart_is_ddpms_posterior"),
    (ddpm, "+ expand_like(lean,", "- expand_like(lean,",
     "Sampler.test_samples_have_the_numbers_of_diffusers"),
    (ddpm, " * D)", " * x0_hat)",
     "Sampler.test_dpm_is_algorithm_2_of_lu_ddim_its_order_1_and_ab2"),
    (ddpm, "0.5 if kind", "0.4 if kind",
     "Sampler.test_dpm_is_algorithm_2_of_lu_ddim_its_order_1_and_ab2"),
    (ddpm, " & (t_next > 0)", "", "Jump.test_dpm_lean_is_h_over_2_h_last_but_0_at_the_ends"),
    (ddpm, "leans * (torch.arange(K, device=device) > 0)", "leans",
     "Sampler.test_the_last_jump_has_no_noise_the_first_no_lean"),
    (ddpm, "if eta > 0 and sigma.any()", "if eta > 0 and (sigma := sigma.clamp(min=0.02)).any()",
     "Sampler.test_the_last_jump_has_no_noise_the_first_no_lean"),
    (ddpm, " * NOISE_STREAMS + stream", "",
     "Sampler.test_noise_depends_on_its_seed_and_stream_alone"),
    (ddpm, "states += [x] * path", "states += [x]",
     "Sampler.test_states_are_kept_only_where_the_path_is_asked_for"),
    (ddpm, "if net.estimates_image else", "if not net.estimates_image else",
     "Sampler.test_estimates_of_images_stay_in_range"),
    (ddpm, "gains[:, k], alpha_bar, eta)", "gains[:1, k].expand(len(x), -1), alpha_bar, eta)",
     "Sampler.test_a_solver_a_row_is_image_by_image_what_its_lists_are"),
    (ddpm, ".clamp(min=K - 1 - k)", ".clamp(min=K - 2 - k)",
     "Numbers.test_times_decrease_and_leave_room_whatever_u"),
    (ddpm, "mask[-1, 0] = mask[0, 1] = False", "mask[-1, 0] = False",
     "Numbers.test_the_mask_is_of_what_changes_a_solver"),
    (ddpm, "torch.logit(times[1:] / times[:-1]", "torch.logit(times[1:] / T",
     "Numbers.test_action_is_the_inverse_of_solver_of_for_all_baseline_solvers"),
    (ddpm, "mean = mean + rate", "mean = mean - rate",
     "Numbers.test_a_policy_gradient_improves_on_its_start_for_points_it_has_not_seen"),
    (ddpm, "h = (1 + gain)[:, :, None, None] * h", "h = (1 + 2 * gain)[:, :, None, None] * h",
     "Network.test_a_gain_scales_the_branch_of_its_block_and_not_the_shortcut"),
    (ddpm, "return self.shortcut(x) + h", "return self.shortcut(x) * (1 if gain is None else (1 + "
     "gain)[:, :, None, None]) + h",
     "Network.test_a_gain_scales_the_branch_of_its_block_and_not_the_shortcut"),
    (ddpm, "iter(gains.split(", "iter(gains.flip(1).split(",
     "Network.test_a_gain_scales_the_branch_of_its_block_and_not_the_shortcut"),
    (ddpm, "h = (1 + gain)[:, :, None, None] * h", "h = (1.001 + gain)[:, :, None, None] * h",
     "Sampler.test_gains_0_and_leans_0_are_the_plain_sampler_to_the_bit"),
    (teacher, "flip(-1)", "flip(-2)", "Training.test_half_of_the_images_are_mirrored"),
    (teacher, "(1, T + 1,", "(1, T,", "Training.test_times_are_uniform_from_1_to_T"),
    (teacher, "], 1 - decay)", "], decay)", "Training.test_ema_averages_parameters"),
    (teacher, "images, size = [], ", "torch.randn(1); images, size = [], ",
     "Training.test_the_target_is_50_quadratic_ddim_steps_and_a_picture_leaves_the_rng_alone"),
    (student, "(d.cos()", "-(d.cos()",
     "Cloning.test_a_jump_at_the_average_velocity_lands_where_it_should"),
    (student, "    zeroed(student", "    (student", "Cloning.test_a_copied_teacher_is_the_teacher"),
    (student, ".sum(1) - 1)", ".sum(1))", "Cloning.test_states_between_the_paths_own_are_ddims"),
    (student, "T, anywhere)", "T - 1, anywhere)", "Cloning.test_jumps_reach_both_ends"),
    (student, "CLONE_SEEDS + self.made, CLONE_SEEDS + self.made +", "CLONE_SEEDS, CLONE_SEEDS +",
     "Cloning.test_the_pool_keeps_the_newest_paths"),
    (student, "(teacher, HELD_OUT, n,", "(teacher, 0, n,",
     "Cloning.test_the_table_is_of_noise_never_trained_on"),
    (reward, " encoder(", " torch.no_grad()(encoder)(", "Rewards.test_gradients_pass_a_frozen_net"),
    (reward, "(b, dim=1)", "(b, dim=0)", "Rewards.test_no_reward_depends_on_the_batch"),
    (reward, "(p * (p / q)", "(q * (q / p)", "Rewards.test_every_term_agrees_with_loops"),
    (reward, "-(seen.images", "(seen.images", "Rewards.test_more_distortion_means_less_reward"),
    (reward, "[m[index] for m in self.maps]", "[m[:len(m[index])] for m in self.maps]",
     "Rewards.test_a_view_of_many_targets_is_seen_in_batches_and_its_rows_are_theirs"),
    (reward, "- 2 * cross", "- cross", "Judging.test_frechet_distance_of_known_gaussians"),
    (reward, "reverse=True", "reverse=False",
     "Deployment.test_the_best_grid_of_each_kind_is_found_and_the_best_kind_comes_first"),
    (reward, "gain, left = reward - start, -start", "gain, left = reward - start, -reward",
     "Results.test_the_printed_table_is_right"),
    (reward, "standard_error(gain - share * left)", "standard_error(gain)",
     "Results.test_the_printed_table_is_right"),
    (rl, "std * self.mask * noise", "std * noise",
     "LogProbabilities.test_a_draw_is_antithetic_of_the_std_of_its_kind_and_0_where_masked"),
    (rl, "[noise, -noise]", "[noise, noise]",
     "LogProbabilities.test_a_draw_is_antithetic_of_the_std_of_its_kind_and_0_where_masked"),
    (rl, " / 2 * self.mask)", " / 2)",
     "LogProbabilities.test_its_log_density_is_a_gaussians_up_to_a_constant"),
    (rl, "solver_of(self.mean())", "solver_of(self.mean().round(decimals=2))",
     "Deployment.test_a_policy_starts_at_its_solver_to_the_bit_and_with_std_0_stays_there"),
    (rl, "x, x0_last = x_next, x0_hat", "x, x0_last = x_next.clamp(-1, 1), x0_hat",
     "Deployment.test_a_rollout_that_adds_no_noise_is_the_deployment_to_the_bit"),
    (rl, "groups.mean(1, keepdim=True)", "groups.mean(0, keepdim=True)",
     "Advantages.test_they_are_centred_by_group_and_scaled_by_batch"),
    (rl, "rounding = 1e-6 * groups.abs().max()", "rounding = 1e-6",
     "Advantages.test_ties_give_exactly_0_and_tiny_rewards_that_differ_do_not"),
    (rl, "centred.abs() > rounding", "centred.abs() >= 0",
     "Advantages.test_ties_give_exactly_0_and_tiny_rewards_that_differ_do_not"),
    (rl, "clipped = ratio.clamp(1 - clip_range, 1 + clip_range)", "clipped = ratio",
     "Surrogate.test_it_is_eq_7_and_the_policy_gradient_without_a_clip_range"),
    (rl, "ratio = (logp - logp_old).clamp(-20, 20)", "ratio = (logp - logp_old)",
     "Surrogate.test_it_is_eq_7_and_the_policy_gradient_without_a_clip_range"),
    (rl, "return -torch.minimum(ratio * adv,", "return torch.minimum(ratio * adv,",
     "Surrogate.test_an_update_of_the_jumps_goes_along_the_pathwise_gradient"),
    (rl, "return -torch.minimum(ratio * adv,", "return torch.minimum(ratio * adv,",
     "Loop.test_it_finds_the_optimum_of_a_known_reward"),
    (rl, "torch.randn(mean.shape, generator=generator).to(z.device)",
     "torch.randn(mean.shape, generator=generator); noise[1::2] = -noise[0::2]",
     "Surrogate.test_the_scores_of_one_landing_and_of_two_are_the_pathwise_gradient"),
    (rl, "logp_old = policy.logp(u, std)", "logp_old = policy.logp(u, 2 * std)",
     "Loop.test_each_epochs_gradient_is_that_of_eq_7_row_by_row"),
    (rl, "sigma, landing_logp(mean,", "sigma, landing_logp(x_next,",
     "Loop.test_each_epochs_gradient_is_that_of_eq_7_row_by_row"),
    (rl, "state = x, x0_last,", "state = x, x,",
     "Loop.test_each_epochs_gradient_is_that_of_eq_7_row_by_row"),
    (rl, "[self.jumps, self.gains], 1)", "[self.jumps, 0 * self.gains], 1)",
     "Loop.test_each_epochs_gradient_is_that_of_eq_7_row_by_row"),
    (rl, "(loss * sigma / mean_sigma)", "loss",
     "Loop.test_each_epochs_gradient_is_that_of_eq_7_row_by_row"),
    (rl, "mean.repeat_interleave(len(x_next) // len(mean), 0)",
     "mean.repeat(len(x_next) // len(mean), 1, 1, 1)",
     "Loop.test_each_epochs_gradient_is_that_of_eq_7_row_by_row"),
    (rl, "sigma.clamp(min=SIGMA_FLOOR) if", "sigma + 1e-9 if",
     "Loop.test_each_epochs_gradient_is_that_of_eq_7_row_by_row"),
    (rl, "repeat_interleave(args.group)\n    u =", "repeat(args.group)\n    u =",
     "Loop.test_a_group_shares_a_noise_and_its_target"),
    (rl, "repeat_interleave(args.group)\n    with", "repeat(args.group)\n    with",
     "Loop.test_a_group_shares_a_noise_and_its_target"),
    (rl, "rows.repeat_interleave(copies, 0)", "rows.repeat(copies, *[1] * (rows.dim() - 1))",
     "Loop.test_a_group_shares_a_noise_and_its_target"),
    (rl, "M * (args.steps + 3)", "M * (args.steps + 4)",
     "Loop.test_training_takes_as_many_evaluations_as_it_says"),
    (rl, "args.updates * 4 * states", "args.updates * 3 * states",
     "Loop.test_training_takes_as_many_evaluations_as_it_says"),
    (rl, "std * (0.2 + 0.8 * left)", "std",
     "Loop.test_rates_fall_to_0_the_std_to_a_fifth_and_what_is_masked_never_moves"),
    (rl, 'parameters["lr"] = rate * left', 'parameters["lr"] *= left',
     "Loop.test_rates_fall_to_0_the_std_to_a_fifth_and_what_is_masked_never_moves"),
    (rl, "/ max(2, args.steps)", "/ args.steps", "Loop.test_more_jumps_and_a_clone_explore_less"),
    (rl, "range(first, args.updates + 1)", "range(first + 1, args.updates + 1)",
     "Loop.test_the_log_begins_before_the_first_update_and_no_column_of_it_is_dead"),
    (rl, "(after - 1 - after.log())", "-after.log()",
     "Loop.test_the_printed_columns_are_what_they_say"),
    (rl, "(HELD_OUT + 10 ** 6, watched)", "(4, watched)",
     "Commands.test_training_validation_and_table_share_no_noise"),
    (rl, "(HELD_OUT, held)", "(7, held)",
     "Commands.test_training_validation_and_table_share_no_noise"),
    (rl, "copy.deepcopy(teacher), None", "teacher, None",
     "Commands.test_who_learns_is_the_teachers_copy_a_student_or_a_policy"),
    (rl, '    a("--encoders",', '    a("--kl", default=0.0)\n    a("--encoders",',
     "Commands.test_every_flag_is_read_after_parsing_and_there_are_not_too_many"),
    (teacher, "seeds[i:i + size] if seeds", "seeds[:size] if seeds",
     "Samples.test_an_image_is_the_same_in_any_batch"),
    (sample, "torch.linspace(0, len(states) - 1, min(len(states), most))",
     "torch.arange(min(len(states), most))",
     "Samples.test_the_path_goes_from_noise_to_image_in_11_states"),
    (sample, "permute(0, 2, 3, 1)", "permute(0, 3, 2, 1)",
     "Commands.test_the_npz_is_what_fid_tools_read"),
    (checkpoints, "load_checkpoint(path, word)",
     "load_checkpoint(path, *[file.stem for file in path.parent.iterdir()])",
     "Kept.test_a_file_that_does_not_fit_is_told_and_made_anew"),
    (checkpoints, "v.half() if half and", "v.half() if",
     "Kept.test_a_network_is_saved_in_fp16_or_as_it_is_with_more_beside_it"),
]


class PlantedMistakes(unittest.TestCase):
    def test_every_planted_mistake_is_noticed_by_a_failed_assertion(self):
        for module, right, wrong, test in PLANTED:
            with self.subTest(test=test, wrong=wrong):
                source = Path(module.__file__).read_text(encoding="utf-8")
                self.assertEqual(source.count(right), 1,
                                 f"'{right}' must stand once in {module.__name__}.py")
                result = self.with_mistake(module, source.replace(right, wrong), test)
                self.assertEqual(result.errors, [], "a crash does not count as noticed")
                self.assertNotEqual(result.failures, [], "the mistake went unnoticed")

    def with_mistake(self, module, source, test):
        """Result of one test while `module`, and what others imported from it, is this source."""
        result, (case, method) = unittest.TestResult(), test.split(".")
        before = {m: dict(vars(m)) for m in MODULES}
        try:
            exec(compile(source, module.__file__, "exec"), vars(module))
            for m, name in itertools.product(MODULES, before[module]):
                if not name.startswith("__") and before[m].get(name) is before[module][name]:
                    setattr(m, name, vars(module)[name])
            test = getattr(test_all, case, None) or getattr(test_harness, case)
            unittest.TestSuite([test(method)]).run(result)             # with setUpClass
        finally:
            for m in MODULES:
                vars(m).update(before[m])
        return result


if __name__ == "__main__":
    unittest.main()
