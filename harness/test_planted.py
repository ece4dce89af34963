"""Each mistake is put into a source file, and a test of test_all.py must notice, by an assertion.

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

MODULES = test_all.MODULES
PLANTED = [  # (module, what the source says, the mistake, the test that notices)
    (ddpm, "torch.ones(1, dtype=torch.float64), ", "", "Jump.test_alpha_bar_equals_the_loop"),
    (ddpm, "* x0 + (1 - ab)", "* x0 - (1 - ab)", "Jump.test_q_sample_is_eq_4"),
    (ddpm, "x_t + ab.sqrt() * v", "x_t - ab.sqrt() * v", "Jump.test_x0_and_eps_explain_x_t"),
    (ddpm, "(eps_hat, eps)", "(eps_hat, eps, reduction='sum')", "Jump.test_simple_loss_is_a_mean"),
    (ddpm, " / ab_next).sqrt()", ").sqrt()", "Jump.test_it_is_eq_12_with_the_sigma_of_eq_16"),
    (ddpm, " - spread(sigma, x_t) ** 2)", ")", "Jump.test_eta_1_one_step_apart_is_ddpms_posterior"),
    (ddpm, "spread(lean,", "-spread(lean,", "Sampler.test_samples_have_the_numbers_of_diffusers"),
    (ddpm, " * D)", " * x0_hat)",
     "Sampler.test_dpm_is_algorithm_2_of_lu_ddim_its_order_1_and_ab2"),
    (ddpm, " & (t_next > 0)", "", "Jump.test_dpm_lean_is_h_over_2_h_last_but_0_at_the_ends"),
    (ddpm, "if k > 1 else 0.0", "", "Sampler.test_the_last_jump_has_no_noise_the_first_no_lean"),
    (ddpm, " * 1009 + stream", "", "Sampler.test_noise_depends_on_its_seed_and_stream_alone"),
    (ddpm, "is not None and k in keep", "or 1", "Sampler.test_only_the_states_asked_for_are_kept"),
    (ddpm, "if net.clip", "if not net.clip", "Sampler.test_estimates_of_images_stay_in_range"),
    (teacher, "flip(-1)", "flip(-2)", "Training.test_half_of_the_images_are_mirrored"),
    (teacher, "(1, T + 1,", "(1, T,", "Training.test_times_are_uniform_from_1_to_T"),
    (teacher, "], 1 - decay)", "], decay)", "Training.test_ema_averages_parameters"),
    (student, "(d.cos()", "-(d.cos()", "Cloning.test_a_secant_jump_lands_where_it_should"),
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
    (reward, "- 2 * cross", "- cross", "Judging.test_frechet_distance_of_known_gaussians"),
    (reward, "any(0)", "gather(0, distance.argmin(0)[None])[0]",
     "Judging.test_precision_and_recall_agree_with_loops"),
    (reward, "(k + 1, dim=1).values  #", "(k, dim=1).values  #",
     "Judging.test_precision_and_recall_agree_with_loops"),
    (rl, "x, K = z.repeat_interleave(group, 0)", "x, K = z.repeat(group, 1, 1, 1)",
     "Loop.test_a_group_shares_a_noise_and_its_target"),
    (rl, "target_all[pick].repeat_interleave(args.group, 0)",
     "target_all[pick].repeat(args.group, 1, 1, 1)",
     "Loop.test_a_group_shares_a_noise_and_its_target"),
    (rl, "clipped = ratio.clamp(1 - clip_range, 1 + clip_range)", "clipped = ratio",
     "Surrogate.test_it_is_eq_7_and_the_policy_gradient_without_a_clip_range"),
    (rl, "return -torch.minimum(ratio * adv,", "return torch.minimum(ratio * adv,",
     "Loop.test_it_finds_the_optimum_of_a_known_reward"),
    (rl, "reverse=True", "reverse=False",
     "Deployment.test_hand_solvers_come_with_their_best_grid_and_the_best_one_first"),
    (rl, "logp_pixels = pixel_logp(mean, x_next, sigma)",
     "logp_pixels = pixel_logp(mean, mean, sigma)",
     "Loop.test_the_ratio_is_1_from_what_is_stored"),
    (rl, "logp = jump_logp(mean_u, u, std, acts)", "logp = jump_logp(u, u, std, acts)",
     "Loop.test_the_ratio_is_1_from_what_is_stored"),
    (rl, "groups.mean(1, keepdim=True)", "groups.mean(0, keepdim=True)",
     "Advantages.test_they_are_centred_by_group_and_scaled_by_batch"),
    (rl, "loss = loss + kl_weight * kl", "loss = loss + kl_weight * kl.detach()",
     "Loop.test_without_advantage_the_kl_alone_pulls_back"),
    (rl, "noise[1::2] = -noise[0::2]", "pass",
     "Loop.test_exploration_is_antithetic_and_of_the_right_spread"),
    (rl, "sigma.clamp(min=SIGMA_FLOOR) if last else sigma", "sigma + 1e-9",
     "Loop.test_exploration_is_antithetic_and_of_the_right_spread"),
    (rl, "torch.tensor([k < steps - 1, k > 0]", "torch.tensor([k < steps - 1, k >= 0]",
     "LogProbabilities.test_a_decision_is_a_gaussian_of_what_acts"),
    (rl, ".clamp(min=n - 1), t - 1)", ".clamp(min=n - 2), t - 1)",
     "Deployment.test_landing_leaves_room_and_ends_at_0"),
    (rl, "std = STD[1] + (STD[0] - STD[1]) * left", "std = STD[0]",
     "Loop.test_one_part_learns_at_a_rate_that_falls_to_0"),
    (rl, "args.lr * left", "args.lr",
     "Loop.test_one_part_learns_at_a_rate_that_falls_to_0"),
    (rl, "noise_and_targets(teacher, HELD_OUT, args", "noise_and_targets(teacher, 2, args",
     "Results.test_training_monitor_and_table_share_no_noise"),
    (reward, "(target - reward)", "(0 - reward)",
     "Results.test_the_printed_table_is_right"),
    (reward, "gain_error=standard_error(gain)", "gain_error=standard_error(reward)",
     "Results.test_the_printed_table_is_right"),
    (rl, 'explores = channel == "pixels" and', "explores = ",
     "Deployment.test_a_very_sharp_policy_is_the_deployment"),
    (rl, "loss * j.sigma / mean_sigma,", "loss,",
     "Loop.test_the_first_gradient_is_reinforces_row_by_row"),
    (teacher, "seeds[i:i + size] if seeds", "seeds[:size] if seeds",
     "Samples.test_an_image_is_the_same_in_any_batch"),
    (sample, "torch.linspace(0, K, min(K + 1, most))", "torch.arange(min(K + 1, most))",
     "Samples.test_the_path_goes_from_noise_to_image_in_11_states"),
    (sample, "permute(0, 2, 3, 1)", "permute(0, 3, 2, 1)",
     "Samples.test_the_npz_is_what_fid_tools_read"),
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
            unittest.TestSuite([getattr(test_all, case)(method)]).run(result)  # with setUpClass
        finally:
            for m in MODULES:
                vars(m).update(before[m])
        return result


if __name__ == "__main__":
    unittest.main()
