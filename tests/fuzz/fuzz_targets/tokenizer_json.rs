#![no_main]

#[path = "../checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(
    init: {
        // A panic inside the tokenizer library is caught and becomes an error; only one that comes out is a finding.
        std::panic::set_hook(Box::new(|_| ()));
    },
    |data: &[u8]| checks::tokenizer_json(data)
);
