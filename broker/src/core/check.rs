//! How invariants are checked: each from the ground up, nothing that is kept up to date is believed.

/// Says what is wrong unless it holds.
macro_rules! hold {
    ($holds:expr, $($wrong:tt)+) => {
        if !$holds {
            return Err(format!($($wrong)+));
        }
    };
}

pub(super) use hold;
