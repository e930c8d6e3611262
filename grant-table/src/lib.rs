//! Grant references: giving, mapping and copying another domain's pages
