//! Seeded draws.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A generator for one purpose of one run: what one part draws does not disturb the others.
pub fn stream(seed: u64, purpose: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ purpose)
}

/// Exponentially distributed with this mean.
pub fn exponential(random: &mut impl Rng, mean: f64) -> f64 {
    -mean * (1.0 - random.random::<f64>()).ln()
}

/// Log-normal with this median and sigma.
pub fn log_normal(random: &mut impl Rng, median: f64, sigma: f64) -> f64 {
    let (u, v): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
    let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    median * (sigma * normal).exp()
}

/// Pareto with this shape between two bounds.
pub fn bounded_pareto(random: &mut impl Rng, low: f64, high: f64, shape: f64) -> f64 {
    let u: f64 = random.random();
    let (l, h) = (low.powf(shape), high.powf(shape));
    (-(u * h - u * l - h) / (h * l)).powf(-1.0 / shape)
}

/// A 64-bit hash of two numbers (the finaliser of SplitMix64).
pub fn hash(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b).wrapping_add(0x1234_5678_9abc_def1);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
