//! Credit: the number of bytes one side may still send.

/// The most credit that can ever be outstanding, in bytes; more is an overflow.
pub const MAX_CREDIT: u32 = i32::MAX as u32;

/// Bytes that may still be sent; every change is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub struct Credit(u32);

/// Credit was overdrawn or grew past [`MAX_CREDIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditError;

impl Credit {
    /// Credit of `bytes`, unless that is over [`MAX_CREDIT`].
    pub const fn new(bytes: u32) -> Result<Self, CreditError> {
        if bytes > MAX_CREDIT {
            return Err(CreditError);
        }
        Ok(Credit(bytes))
    }

    /// How many bytes it is good for.
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// Spends `bytes`.
    pub const fn spend(&mut self, bytes: u32) -> Result<(), CreditError> {
        match self.0.checked_sub(bytes) {
            Some(left) => {
                self.0 = left;
                Ok(())
            }
            None => Err(CreditError),
        }
    }

    /// Adds `bytes`.
    pub const fn add(&mut self, bytes: u32) -> Result<(), CreditError> {
        match self.0.checked_add(bytes) {
            Some(sum) if sum <= MAX_CREDIT => {
                self.0 = sum;
                Ok(())
            }
            _ => Err(CreditError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_overdraws_nor_overflows() {
        let mut credit = Credit::new(10).unwrap();
        assert_eq!(credit.spend(11), Err(CreditError));
        assert_eq!(credit.add(MAX_CREDIT - 9), Err(CreditError));
        assert_eq!(credit.add(u32::MAX), Err(CreditError));
        assert_eq!(credit.bytes(), 10);
        assert_eq!(Credit::new(MAX_CREDIT + 1), Err(CreditError));
    }
}
