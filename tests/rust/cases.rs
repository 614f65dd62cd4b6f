//! How many cases a property is tried with: a few, or as many as `PROPTEST_CASES` says where that is more.

use proptest::prelude::ProptestConfig;

pub fn cases(few: u32) -> ProptestConfig {
    let many = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    ProptestConfig::with_cases(few.max(many))
}
