//! How long a GPU takes to compute. This is a roofline model, not a measurement.
//!
//! * Prefill of `n` new tokens over `c` cached tokens: `2 P n` FLOP for the weights (one multiply and one add for
//!   each of `P` parameters and each token) and `4 L H d n (c + n/2)` FLOP for attention (scores and values, `2 d`
//!   FLOP each, for every query head over the average context of a causal mask). This follows Kaplan et al. 2020,
//!   section 2.1, with half the attention because of the causal mask. A prefill never takes less time than reading
//!   weights and KV once from HBM.
//! * A decode step of `b` sequences that have `t` tokens of context together takes the larger of two times: the
//!   time of `2 P b` plus attention FLOP, and the time to read the weights and the KV of `t` tokens once from HBM.
//!
//! Peak numbers are the dense bfloat16 rates of the datasheets. An [`Engine`] reaches a share of them.

use super::models::{ELEMENT_BYTES, ModelShape};

/// What a serving engine makes of a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Engine {
    /// Its name, and where the numbers are from.
    pub name: &'static str,
    /// Share of peak FLOP/s that prefill reaches.
    pub compute_efficiency: f64,
    /// Share of peak HBM bytes/s that decode reaches.
    pub memory_efficiency: f64,
    /// The shortest step, seconds: launching its kernels.
    pub step_s: f64,
    /// What a request takes beside the GPU, seconds: tokens, hashes, scheduling. Others compute meanwhile.
    pub request_s: f64,
}

impl Engine {
    /// vLLM with CUDA graphs. The shares and times are fitted to what was measured on two H200 (`measured`).
    pub const VLLM: Self = Self {
        name: "vLLM 0.32, CUDA graphs; fitted to two H200",
        compute_efficiency: 0.75,
        memory_efficiency: 0.8,
        step_s: 0.006,
        request_s: 0.040,
    };

    /// The same without CUDA graphs.
    pub const VLLM_EAGER: Self = Self {
        name: "vLLM 0.32, eager; fitted to two H200",
        step_s: 0.019,
        ..Self::VLLM
    };
}

/// A GPU's peak rates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// The GPU's name in `--gpu`.
    pub name: &'static str,
    /// The source of the numbers.
    pub source: &'static str,
    /// Peak rate of dense bfloat16 arithmetic, FLOP/s.
    pub flops: f64,
    /// Peak rate of HBM, bytes/s.
    pub hbm_bytes_per_second: f64,
    /// HBM usable by programs, bytes.
    pub hbm_bytes: u64,
    /// Rate between the GPU and pinned host memory, one direction, bytes/s: 80 % of the PCIe generation's x16 rate.
    pub host_bytes_per_second: u64,
}

/// The GPUs known by name.
pub const GPUS: [Gpu; 5] = [
    Gpu {
        name: "h100-sxm",
        source: "NVIDIA H100 datasheet, SXM: 989.4 TFLOP/s, 3.35 TB/s, PCIe 5.0",
        flops: 989.4e12,
        hbm_bytes_per_second: 3.35e12,
        hbm_bytes: 80 << 30,
        host_bytes_per_second: 50_000_000_000,
    },
    Gpu {
        name: "h100-nvl",
        source: "NVIDIA H100 datasheet, NVL: 835.5 TFLOP/s, 3.9 TB/s, PCIe 5.0",
        flops: 835.5e12,
        hbm_bytes_per_second: 3.9e12,
        hbm_bytes: 93 << 30,
        host_bytes_per_second: 50_000_000_000,
    },
    Gpu {
        name: "h200",
        source: "NVIDIA H200 datasheet, SXM: 989.4 TFLOP/s, 4.8 TB/s, PCIe 5.0",
        flops: 989.4e12,
        hbm_bytes_per_second: 4.8e12,
        hbm_bytes: 140 << 30,
        host_bytes_per_second: 50_000_000_000,
    },
    Gpu {
        name: "a100-80g",
        source: "NVIDIA A100 80GB datasheet, SXM: 312 TFLOP/s, 2.039 TB/s, PCIe 4.0",
        flops: 312e12,
        hbm_bytes_per_second: 2.039e12,
        hbm_bytes: 80 << 30,
        host_bytes_per_second: 25_000_000_000,
    },
    Gpu {
        name: "l40s",
        source: "NVIDIA L40S datasheet: 362.05 TFLOP/s, 864 GB/s, PCIe 4.0",
        flops: 362.05e12,
        hbm_bytes_per_second: 864e9,
        hbm_bytes: 45 << 30,
        host_bytes_per_second: 25_000_000_000,
    },
];

impl Gpu {
    /// The GPU of that name.
    ///
    /// # Errors
    /// When there is no such GPU. The error lists all names.
    pub fn by_name(name: &str) -> Result<&'static Self, String> {
        let known = || GPUS.map(|gpu| gpu.name).join(", ");
        GPUS.iter()
            .find(|gpu| gpu.name == name)
            .ok_or_else(|| format!("no GPU {name:?}; takes one of {}", known()))
    }
}

/// A model on a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// The model.
    pub model: ModelShape,
    /// The GPU that it runs on.
    pub gpu: Gpu,
    /// What the engine makes of it.
    pub engine: Engine,
}

impl Roofline {
    fn flops(&self) -> f64 {
        self.gpu.flops * self.engine.compute_efficiency
    }

    fn memory(&self) -> f64 {
        self.gpu.hbm_bytes_per_second * self.engine.memory_efficiency
    }

    /// FLOP of attention for each pair of a query token and a context token, over all layers.
    fn attention_flop(&self) -> f64 {
        let model = &self.model;
        4.0 * model.layers as f64 * f64::from(model.heads) * f64::from(model.head_dim)
    }

    /// Seconds to prefill `new` tokens over `cached` tokens, all layers.
    pub fn prefill_s(&self, new: u64, cached: u64) -> f64 {
        let (n, c) = (new as f64, cached as f64);
        let flop = 2.0 * self.model.parameters * n + self.attention_flop() * n * (c + n / 2.0);
        let bytes = self.model.parameters * ELEMENT_BYTES as f64 + self.kv_bytes(n + c);
        (flop / self.flops()).max(bytes / self.memory())
    }

    /// Seconds of one decode step of `sequences` that have `context_tokens` tokens of context together.
    pub fn decode_step_s(&self, sequences: u64, context_tokens: f64) -> f64 {
        let flop =
            2.0 * self.model.parameters * sequences as f64 + self.attention_flop() * context_tokens;
        let bytes = self.model.parameters * ELEMENT_BYTES as f64 + self.kv_bytes(context_tokens);
        (flop / self.flops()).max(bytes / self.memory())
    }

    /// Seconds that decoding one token for each of `sequences` adds to a prefill pass in the same batch. The pass
    /// reads the weights anyway, so only the FLOP and the KV of these sequences count.
    pub fn ride_along_s(&self, sequences: u64, context_tokens: f64) -> f64 {
        let flop = 2.0 * self.model.parameters * sequences as f64;
        flop / self.flops() + self.kv_bytes(context_tokens) / self.memory()
    }

    fn kv_bytes(&self, tokens: f64) -> f64 {
        tokens * self.model.bytes_per_token() as f64
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Half of the FLOP/s, four fifths of the memory's rate, and nothing besides.
    pub(crate) const ROUND: Engine = Engine {
        name: "round",
        compute_efficiency: 0.5,
        memory_efficiency: 0.8,
        step_s: 0.0,
        request_s: 0.0,
    };

    fn roofline() -> Roofline {
        Roofline {
            model: ModelShape {
                name: "round",
                source: "test",
                parameters: 1e9,
                layers: 10,
                heads: 10,
                kv_heads: 10,
                head_dim: 100,
            },
            gpu: Gpu {
                name: "round",
                source: "test",
                flops: 2e12,
                hbm_bytes_per_second: 1.25e12,
                hbm_bytes: 1,
                host_bytes_per_second: 1,
            },
            engine: ROUND,
        }
    }

    fn close(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 1e-9, "{found} {expected}");
    }

    #[test]
    fn prefill_matches_numbers_worked_by_hand() {
        // 2e9 * 1000 + 4 * 10 * 10 * 100 * 1000 * (2000 + 500) = 2e12 + 1e11 FLOP, at 1e12 FLOP/s.
        close(roofline().prefill_s(1000, 2000), 2.1);
        // One token: 2e9 + 4e4 * 0.5 FLOP take 2 ms; its bytes (2e9 + 40 000) take 2.00004 ms at 1e12 B/s.
        close(roofline().prefill_s(1, 0), 2.00004e-3);
    }

    #[test]
    fn decode_is_bound_by_memory_first_and_by_compute_later() {
        // (2e9 + 1e5 * 4e4) bytes at 1e12 B/s = 6 ms; 2e9 + 4e4 * 1e5 = 6e9 FLOP = 6 ms too.
        close(roofline().decode_step_s(1, 1e5), 6e-3);
        // 100 sequences: 2e11 FLOP = 200 ms, and 4 ms of attention.
        close(roofline().decode_step_s(100, 1e5), 0.204);
    }

    #[test]
    fn riding_along_spares_the_weights() {
        // 2e10 FLOP = 20 ms, 4e9 bytes = 4 ms.
        close(roofline().ride_along_s(10, 1e5), 0.024);
        assert_eq!(roofline().ride_along_s(0, 0.0), 0.0);
    }

    #[test]
    fn caching_never_makes_a_prompt_slower() {
        let roofline = Roofline {
            model: *ModelShape::by_name("qwen3-8b").unwrap(),
            gpu: *Gpu::by_name("h100-sxm").unwrap(),
            engine: Engine::VLLM,
        };
        let mut last = f64::INFINITY;
        for cached in (0..126_000).step_by(500) {
            let time = roofline.prefill_s(126_195 - cached, cached);
            assert!(time <= last, "{cached} cached: {time} after {last}");
            last = time;
        }
    }
}
