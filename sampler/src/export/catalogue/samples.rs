//! Samples of the compute engine and the clock of their times.

use super::{Collector, DEVICE, Family, IN_MIG_MODE, families};

families! {
    in Samples;
    LAST_SAMPLE: Family::gauge("gpu_sampler_last_sample_timestamp_seconds", "seconds", DEVICE)
        .in_collector(Collector::Gpus)
        .help("Time at which the newest driver sample of the GPU was read, in seconds since the epoch.")
        .absent("before the first sample, and for a GPU in MIG mode");
    SAMPLE_PERIOD: Family::gauge("gpu_sampler_sample_period_seconds", "seconds", DEVICE)
        .in_collector(Collector::Gpus)
        .help("Sampling period of the driver, in seconds, as derived from its samples.")
        .absent("until the period is derived, and for a GPU in MIG mode");
    SAMPLES: Family::counter("gpu_sampler_samples_total", "samples", DEVICE)
        .in_collector(Collector::Gpus)
        .help("Number of driver samples of the GPU that are accounted for.")
        .absent(IN_MIG_MODE)
        .starts_at_zero();
    QUERIED_SAMPLES: Family::counter("gpu_sampler_queried_samples_total", "samples", DEVICE)
        .in_collector(Collector::Gpus)
        .help("Number of driver samples of the GPU of which the processes were queried. The time of all other samples is distributed in \
               proportion to these.")
        .absent(IN_MIG_MODE)
        .starts_at_zero();
    SHARE_STDERR: Family::gauge("gpu_sampler_share_stderr_ratio", "ratio", DEVICE)
        .in_collector(Collector::Precision)
        .help("Standard error of a share of one half over 10 seconds, from 0 to 1, at the rate at which processes were queried in the past \
               10 seconds.")
        .absent("while the GPU is idle, if it is measured by GPM, and for a GPU in MIG mode");
    SAMPLE_GAPS: Family::counter("gpu_sampler_sample_gaps_total", "gaps", DEVICE)
        .in_collector(Collector::Gpus)
        .help("Number of times that samples were lost between two polls of the GPU.")
        .absent(IN_MIG_MODE)
        .starts_at_zero();
    RING_OVERRUNS: Family::counter("gpu_sampler_ring_overruns_total", "gaps", DEVICE)
        .help("Number of sample gaps caused by the driver's sample buffer wrapping before it was read.")
        .absent(IN_MIG_MODE)
        .starts_at_zero();
    REJECTED_SAMPLES: Family::counter("gpu_sampler_rejected_samples_total", "samples", &["uuid", "gpu_uuid", "reason"])
        .help("Number of device and process samples that violate the driver's own rules, by reason.")
        .absent(IN_MIG_MODE)
        .starts_at_zero();
    CLOCK_OFFSET: Family::gauge("gpu_sampler_clock_offset_seconds", "seconds", DEVICE)
        .help("Clock of the GPU minus the boot time of the machine, in seconds: the upper bound that polls give.")
        .absent("before the first samples, and for a GPU in MIG mode");
    CLOCK_UNCERTAINTY: Family::gauge("gpu_sampler_clock_uncertainty_seconds", "seconds", DEVICE)
        .help("Width of the interval below gpu_sampler_clock_offset_seconds that contains the true offset, in seconds, provided that the \
               driver serves a sample within a sampling period.")
        .absent("until the sampling period is derived, and for a GPU in MIG mode");
    CLOCK_DRIFT: Family::gauge("gpu_sampler_clock_drift_ratio", "ratio", DEVICE)
        .help("Time that the clock of the GPU gains per second, in seconds.")
        .absent("in the first minute, and for a GPU in MIG mode");
    CLOCK_STEPS: Family::counter("gpu_sampler_clock_steps_total", "steps", DEVICE)
        .help("Number of times that the clock of the GPU was set.")
        .absent(IN_MIG_MODE)
        .starts_at_zero();
}
