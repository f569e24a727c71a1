"""The recipes: one readable script a verb. Copy one to make your own."""
