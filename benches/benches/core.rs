//! Benches of the pure core.

use criterion::{Criterion, criterion_group, criterion_main};
use sampler_core::labels::parse;

fn paths(c: &mut Criterion) {
    let id = "0123456789abcdef".repeat(4);
    let short = format!("/kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{id}");
    let long = format!("/{}{short}", "a".repeat(4096 - short.len() - 1));
    let deep = format!("{short}{}", "/x".repeat((4096 - short.len()) / 2));
    for (name, path) in [("short", &short), ("long", &long), ("deep", &deep)] {
        c.bench_function(&format!("parse/{name}"), |b| b.iter(|| parse(std::hint::black_box(path))));
    }
}

criterion_group!(benches, paths);
criterion_main!(benches);
