"""The workbook's machinery: stages, the chain of notebooks, the study, claims, report, figures and plan."""
